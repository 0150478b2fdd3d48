//! What the cases stand on.
//!
//! ```text
//! suite ── containerd (private, one a version) ── ctr (one namespace of it) ── image, guests
//!       │                                         └─ site (a container that serves) ── http (its clients)
//!       ├─ cri (a kubelet: pods, in the network of a node)
//!       ├─ api (containerd's own, for what `ctr` cannot make)
//!       └─ shim (the bare binary: bundles, ttrpc, recorded events)
//!                          both ── job (a child process, its output), wait (deadlines), proc (what /proc says),
//!                                  machine (whether its cores were there)
//! ```
//! Invariant: everything awaited has a deadline and a name that the failure shows; everything started is ended, by this
//! process or, should it be killed, by its guard.

pub mod api;
pub mod base;
pub mod cgroup;
pub mod containerd;
pub mod cri;
pub mod ctr;
pub mod events;
pub mod guests;
pub mod http;
pub mod image;
pub mod job;
pub mod machine;
pub mod native;
pub mod node;
pub mod proc;
pub mod recorder;
pub mod shim;
pub mod site;
pub mod usage;
pub mod wait;

/// How a case ends.
pub type Outcome = anyhow::Result<()>;

/// Cases that run under a containerd, by name; each is run for every version.
pub type Cases = &'static [(&'static str, fn(&containerd::Containerd) -> Outcome)];

/// Cases of the binary alone.
pub type BareCases = &'static [(&'static str, fn() -> Outcome)];

/// Long enough for anything that is to happen at once, on a machine of two slow cores that also compiles.
pub const SOON: std::time::Duration = std::time::Duration::from_secs(20);
