//! What a container does once it is started: a command, or a server.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::error::Result;
use crate::guest::{Outcome, Run, Stage};
use crate::http;
use crate::signals::Signals;

/// Everything a start needs; dropped instead, nothing of it is left.
pub enum Work {
    Command(Box<Run>),
    /// With its socket, bound in the pod's network.
    Server(Box<http::Plan>, OwnedFd),
}

impl Work {
    /// Begins, on the threads that are for it.
    ///
    /// # Errors
    /// `Host` when a server cannot listen.
    pub fn begin(self, stage: &Arc<Stage>, signals: watch::Receiver<Signals>) -> Result<JoinHandle<Outcome>> {
        let stage = Arc::clone(stage);
        match self {
            Self::Command(run) => {
                let runtime = stage.runtime.clone();
                Ok(runtime.spawn(async move { run.drive(&stage.ticker, signals).await }))
            }
            Self::Server(plan, socket) => plan.begin(socket, stage, signals),
        }
    }
}
