//! The guests: wasm programs, and the only module that names wasmtime.
//!
//! ```text
//!  bytes ─▶ Programs (compile child, cache, map) ─▶ Program ─▶ entry
//!                                                      │
//!             Run { environment, stdio, budget } ──────┼─▶ Outcome
//!             Serving { host } ── one a request ───────┴─▶ Flight ─▶ Exchange
//! ```
//!
//! Read in this order: `module` and `workshop` (how bytes become a program), `program` (imports and entry), `store`, `run`,
//! `exit`; for servers `proxy` (linked), `serving` (a request's visit), `visitor` (its store), `exchange` (its answer), `warm`
//! and `shared` (instances for several requests, of 0.2 and 0.3); then `engine`, `pool`, `epoch`, `quota` and `limits`,
//! which keep guests from harming each other.

mod cache;
mod code;
mod compile;
mod engine;
mod epoch;
mod exchange;
mod exit;
mod failure;
mod hooks;
mod inspect;
mod job;
mod known;
mod limits;
mod module;
mod nature;
mod pool;
mod prewarm;
mod program;
mod proxy;
mod quota;
mod random;
mod run;
mod service;
mod serving;
mod shared;
mod sockets;
mod store;
mod swap;
mod text;
mod tidy;
mod turn;
mod visitor;
mod warm;
mod worker;
mod workshop;

use std::sync::Arc;

pub use code::Code;
pub use compile::CompileSettings;
pub use engine::{Bounds, Engines, Kind};
pub use epoch::{TICK, Ticker};
pub use exchange::{BodyFault, Exchange, Failure, Place};
pub use exit::Outcome;
pub use failure::LoadError;
pub use hooks::Hooks;
pub use limits::Budget;
pub use module::Programs;
pub use pool::INSTANCES;
pub use prewarm::{Entry as CacheEntry, Prewarm};
pub use program::{Entry, Program};
pub use quota::{CpuTime, Throttled};
pub use run::Run;
pub use serving::{Begun, Entrance, Flight, Serving, Step};
pub use shared::Reuse;
pub use sockets::Sockets;
pub use store::Environment;
pub use visitor::Host;
pub use worker::compile_worker;

use crate::error::Result;

/// What all guests of the process share.
pub struct Stage {
    /// The loaded programs.
    pub programs: Programs<Program>,
    /// The tick.
    pub ticker: Ticker,
    /// The runtime that polls guests; the control plane has its own thread.
    pub runtime: tokio::runtime::Handle,
}

impl Stage {
    /// The stage of a process whose guests run on `runtime`.
    ///
    /// # Errors
    /// `Host` when the epoch thread cannot be started.
    pub fn new(compile: CompileSettings, runtime: tokio::runtime::Handle) -> Result<Arc<Self>> {
        let engines = Engines::new();
        let ticker = Ticker::start(engines.clone())?;
        Ok(Arc::new(Self { programs: Programs::new(engines, compile, Program::link), ticker, runtime }))
    }
}
