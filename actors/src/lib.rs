//! Troupe's actors: everything behind the shim API. Knows neither ttrpc nor protobuf.
//!
//! ```text
//!   the edge (src/)                                 told in order
//!      │ Create Start Kill Delete …                      ▲
//!      ▼                                                 │ Event
//!   Supervisor ── owns ──▶ Container (one each) ─────────┘
//!   the table               one state machine
//!                             │ prepares            │ runs
//!                             ▼                     ▼
//!              Bundle, RootFs, Pod, Stdio       a command: guest::Run on the guests' runtime
//!                                               a server:  http::Server on the workers
//!                                               a Linux program: native::Task, through runc
//! ```
//!
//! Reading order: `supervisor` (the verbs), `container` (one life), `http` (servers), `native` (Linux programs), `guest`
//! (wasm), `outgoing` (requests of guests), `names` (of hosts), `pod` (namespaces and sockets); the leaves `blocking`, `bundle`,
//! `resources`, `image`, `mounts`, `stdio`, `users`, `signals`, `event`, `error`, `config`, `units` as they come up. A module names
//! only what stands after it in that list.

mod blocking;
mod bundle;
mod config;
mod container;
mod error;
mod event;
mod files;
pub mod guest;
mod host;
mod http;
mod id;
mod image;
mod mounts;
mod names;
mod native;
mod outgoing;
mod pod;
mod resources;
mod sharded;
mod signals;
mod stdio;
mod supervisor;
mod units;
mod users;

pub use blocking::keep_a_thread;
pub use config::{RuncOptions, Settings, SocketPolicy};
pub use container::{
    AddExec, Blueprint, DeleteExec, ExecPids, Exit, FindExec, Handle, KillExec, Measured, Pause, Phase, Resume,
    StartExec, Usage,
};
pub use error::{Error, Result};
pub use event::{Event, EventKind, Events};
pub use http::HttpSettings;
pub use id::ContainerId;
pub use image::{Content, ImageModule, Images, Wanted, absolute};
pub use mounts::{Mount, isolate};
pub use native::{DeviceLine, Stats as NativeStats, clean_up as clean_up_native, keep_descriptor_limit};
pub use stdio::StdioPaths;
pub use supervisor::{Create, Delete, Drain, Drained, Find, Kill, List, Pass, Start, Supervisor, Update};
pub use units::{NotAQuantity, parse_bytes, parse_duration};
