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
//! ```
//!
//! Reading order: `supervisor` (the verbs), `container` (one life), `http` (servers), `guest` (wasm), `outgoing` (requests
//! of guests), `names` (of hosts), `pod` (namespaces and sockets); the leaves `bundle`, `resources`, `image`, `mounts`,
//! `stdio`, `signals`, `event`, `error`, `config`, `units` as they come up. A module names only what stands after it in that list.

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
mod outgoing;
mod pod;
mod resources;
mod signals;
mod stdio;
mod supervisor;
mod units;

pub use config::{Settings, SocketPolicy};
pub use container::{Blueprint, Exit, Handle, Phase, Usage};
pub use error::{Error, Result};
pub use event::{Event, EventKind, Events};
pub use http::HttpSettings;
pub use id::ContainerId;
pub use image::{Content, ImageModule, Images, Wanted, absolute};
pub use mounts::{Mount, isolate};
pub use stdio::StdioPaths;
pub use supervisor::{Create, Delete, Drain, Drained, Find, Kill, List, Start, Supervisor, Update};
pub use units::{NotAQuantity, parse_bytes, parse_duration};
