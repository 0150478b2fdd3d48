//! What a container does once it is started: a command, a server, a Linux program, or, as a pod's sandbox, nothing.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::error::{Error, Result};
use crate::guest::{Outcome, Run, Stage};
use crate::http;
use crate::native::Task;
use crate::signals::Signals;

/// Everything a start needs; dropped instead, nothing of it is left.
pub enum Work {
    Command(Box<Run>),
    /// With its socket, bound in the pod's network.
    Server(Box<http::Plan>, OwnedFd),
    /// The pod's namespaces are there: that is all.
    Sandbox,
    /// Created already, as runc has it.
    Native(Arc<Task>),
}

impl Work {
    /// Begins, on the threads that are for it.
    ///
    /// # Errors
    /// `Host` when a server cannot listen; `Internal` for a native one, which `native` starts.
    pub fn begin(self, stage: &Arc<Stage>, signals: watch::Receiver<Signals>) -> Result<JoinHandle<Outcome>> {
        let stage = Arc::clone(stage);
        match self {
            Self::Command(run) => {
                let runtime = stage.runtime.clone();
                Ok(runtime.spawn(async move { run.drive(&stage.ticker, signals).await }))
            }
            Self::Server(plan, socket) => plan.begin(socket, stage, signals),
            Self::Sandbox => Ok(stage.runtime.spawn(sandbox(signals))),
            Self::Native(_) => Err(Error::Internal("a Linux program has no guest".into())),
        }
    }
}

/// Waits to be stopped, as the pause program does that others run for this.
async fn sandbox(mut signals: watch::Receiver<Signals>) -> Outcome {
    let signal = signals.wait_for(|signals| signals.count > 0).await.map(|signals| signals.first);
    match signal.ok().and_then(|signal| rustix::process::Signal::from_named_raw(signal.into())) {
        Some(rustix::process::Signal::TERM | rustix::process::Signal::INT) => Outcome::Exited(0),
        Some(signal) => Outcome::Killed(u8::try_from(signal.as_raw()).unwrap_or_default()),
        // The owner is gone without a word: the process is being torn down.
        None => Outcome::Killed(u8::try_from(rustix::process::Signal::KILL.as_raw()).unwrap_or_default()),
    }
}
