//! What everybody may know of a container, and what does not change its state: read here, past its actor's mailbox.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;

use super::state::{Exit, Phase};
use crate::ContainerId;
use crate::error::{Error, Result};
use crate::guest::{Budget, CpuTime, Throttled};
use crate::native::{Process, Stats, Task};
use crate::stdio::{Keeper, StdioPaths};

/// Of a container, or of a process that was executed in one.
#[derive(Clone)]
pub struct Handle {
    pub id: ContainerId,
    pub bundle: PathBuf,
    pub stdio: StdioPaths,
    /// The anchor thread's id, or a native process's; zero for an exec that was not started.
    pub pid: u32,
    pub(super) phase: watch::Receiver<Phase>,
    pub(super) stdin: Option<Keeper>,
    pub(super) budget: Arc<Budget>,
    pub(super) cpu: Arc<CpuTime>,
    /// Of a native container.
    pub(super) native: Option<Native>,
}

/// What runc runs.
#[derive(Clone)]
pub(super) struct Native {
    pub task: Arc<Task>,
    /// Its first process or an exec, once it exists.
    pub process: Option<Arc<Process>>,
}

/// What a container uses.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// CPU time of its guest.
    pub cpu: std::time::Duration,
    /// Memory its guest reserved, in bytes: now, at most, and its limit.
    pub memory: u64,
    pub memory_peak: u64,
    pub memory_limit: Option<u64>,
    /// Whether it was ended for wanting more.
    pub out_of_memory: bool,
    /// What its CPU quota has done.
    pub throttled: Throttled,
}

/// What was measured, for each kind of container.
#[derive(Debug, Clone)]
pub enum Measured {
    Guest(Usage),
    Native(Stats),
}

impl Handle {
    /// Where the container is.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Waits for the exit; answers at once for an exited container, also for a deleted one.
    ///
    /// # Errors
    /// `Internal` when the container's actor died without an exit.
    pub async fn wait(&mut self) -> Result<Exit> {
        let stopped = self.phase.wait_for(|phase| phase.exit().is_some()).await;
        let exit = stopped.ok().and_then(|phase| phase.exit());
        exit.ok_or_else(|| Error::Internal(format!("container {} ended without an exit", self.id)))
    }

    /// Ends the guest's stdin once its client has closed it as well.
    pub fn close_stdin(&self) {
        if let Some(stdin) = &self.stdin {
            stdin.close();
        }
    }

    /// What it uses now.
    ///
    /// # Errors
    /// `Internal` only.
    pub async fn measure(&self) -> Result<Measured> {
        match &self.native {
            Some(native) => native.task.stats().await.map(Measured::Native),
            None => Ok(Measured::Guest(self.usage())),
        }
    }

    /// The numbers of its processes: of a guest, the one that stands for it.
    ///
    /// # Errors
    /// `Host` with what runc says.
    pub async fn processes(&self) -> Result<Vec<u32>> {
        match &self.native {
            Some(native) if self.phase().exit().is_none() => native.task.processes().await,
            Some(_) | None => Ok(vec![self.pid]),
        }
    }

    /// Changes the limits of a native container: JSON as in the spec. `None` for a guest, whose actor does that.
    ///
    /// # Errors
    /// `Host` with what runc says.
    pub async fn update_native(&self, resources: &[u8]) -> Option<Result<()>> {
        match &self.native {
            Some(native) => Some(native.task.update(resources).await),
            None => None,
        }
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// `Unsupported` for a guest, `Invalid` without a terminal.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        match &self.native {
            Some(Native { process: Some(process), .. }) => process.resize(columns, rows),
            Some(_) => Err(Error::invalid("resize: the process was not started")),
            None => Err(Error::Unsupported("resize is not supported: WASI has no terminals".into())),
        }
    }

    fn usage(&self) -> Usage {
        Usage {
            cpu: self.cpu.total(),
            memory: self.budget.used(),
            memory_peak: self.budget.peak(),
            memory_limit: self.budget.limit(),
            out_of_memory: self.budget.exceeded(),
            throttled: self.cpu.throttled(),
        }
    }
}
