//! The servers: `wasi:http` containers.
//!
//! ```text
//! Server::run ── accept ──▶ connection (a worker) ── a request ──▶ respond ──▶ guest::Flight
//!   listener, drain          HTTP/1.1, HTTP/2, timeouts            permit, deadline, answer
//! ```
//! Reading order: `server` (a life), `connection` and `progress`, `request` (the path of a request), `body`, `visit` (accounting); then
//! `workers` and `admission`, which keep servers from harming each other, and `settings`.
//!
//! Not an actor of its own: a server has one owner, the container's actor, which hears of its end as of a command's; and
//! one input, its signals. Called by `container`.

mod admission;
mod bell;
mod body;
mod connection;
mod gate;
mod plan;
mod progress;
mod request;
mod server;
mod settings;
mod streams;
mod visit;
mod workers;

use std::sync::{Arc, Mutex, PoisonError};

pub use admission::Slots;

pub use plan::Plan;
pub use settings::HttpSettings;
pub use workers::Workers;

/// What all servers of the process share; made when the first one comes.
#[derive(Debug, Default)]
pub struct Common {
    pub slots: Arc<Slots>,
    workers: Mutex<Option<Arc<Workers>>>,
}

impl Common {
    /// The worker threads.
    ///
    /// # Errors
    /// When they cannot be started.
    pub fn workers(&self) -> std::io::Result<Arc<Workers>> {
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(workers) = &*workers {
            return Ok(Arc::clone(workers));
        }
        Ok(Arc::clone(workers.insert(Arc::new(Workers::start()?))))
    }
}
