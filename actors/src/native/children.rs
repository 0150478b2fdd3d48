//! The processes of native containers: children of this process, reaped one by one.
//!
//! runc makes a container's process and leaves; the kernel then hands the process to the nearest *subreaper*, which we
//! become with the first native container. From then on also those come to us that no one waits for: what a container
//! without a pid namespace of its own leaves behind.
//!
//! ```text
//!   runc create ──makes──▶ init          runc ends: init is ours, waited for through its pidfd
//!                            └─▶ daemon   its parent ends: an orphan, ours too, reaped by `sweep`
//! ```
//! Invariant: nobody's child is stolen. Each process is waited for by its own number, never "any child". An orphan is told
//! from a child that somebody here waits for by two facts: the kernel gives orphans to the main thread, and nothing in this
//! process is started from there; and the numbers of containers' processes are known, or about to be, which stops the sweep.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::StreamExt as _;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, set_child_subreaper, waitid,
};
use tokio::io::Interest;
use tokio::runtime::Handle;

use crate::error::{Error, Result};
use crate::stdio::watched;

/// All of them.
#[derive(Debug, Default)]
pub struct Children(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    subreaper: bool,
    /// How many runcs may leave a child that is not known yet.
    expected: usize,
    known: HashSet<u32>,
}

/// Held while a runc is at work that leaves a child.
#[derive(Debug)]
pub struct Expecting(Arc<Children>);

/// One process of a container.
#[derive(Debug)]
pub struct Child {
    pid: u32,
    pidfd: OwnedFd,
    children: Arc<Children>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Exited(u8),
    Killed(u8),
    /// Somebody else took its status.
    Unknown,
}

impl Children {
    /// Makes sure that what the next runc leaves behind comes to us.
    ///
    /// # Errors
    /// `Host` when the kernel refuses to make this process a subreaper.
    pub fn expect(self: &Arc<Self>, runtime: &Handle) -> Result<Expecting> {
        let mut table = self.lock();
        if !table.subreaper {
            set_child_subreaper(Pid::from_raw(1)).map_err(|e| Error::host("become a subreaper", e))?;
            table.subreaper = true;
            drop(runtime.spawn(sweep_always(Arc::clone(self))));
        }
        table.expected += 1;
        Ok(Expecting(Arc::clone(self)))
    }

    /// Reaps the orphans that have ended. Some system calls, none of which waits.
    fn sweep(&self) {
        let table = self.lock();
        if table.expected > 0 {
            return;
        }
        let main = std::process::id();
        let Ok(list) = std::fs::read_to_string(format!("/proc/self/task/{main}/children")) else { return };
        for pid in list.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()) {
            if let Some(orphan) = to_pid(pid).filter(|_| !table.known.contains(&pid)) {
                // One that has not ended yet stays, and one that is gone is no matter.
                let _ = waitid(WaitId::Pid(orphan), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sweeps whenever a child ends. Lives as long as the process does.
async fn sweep_always(children: Arc<Children>) {
    match signal_hook_tokio::Signals::new([signal_hook::consts::SIGCHLD]) {
        Ok(mut signals) => {
            while signals.next().await.is_some() {
                children.sweep();
            }
        }
        Err(error) => tracing::warn!(%error, "orphans of native containers stay zombies"),
    }
}

impl Expecting {
    /// The process that runc has left.
    ///
    /// # Errors
    /// `Host` when there is none of this number.
    pub fn adopt(&self, pid: u32) -> Result<Child> {
        let what = || format!("watch process {pid} of a container");
        let number = to_pid(pid).ok_or_else(|| Error::host(what(), rustix::io::Errno::SRCH))?;
        // Its number is its own: nobody but us reaps it.
        let pidfd = pidfd_open(number, PidfdFlags::empty()).map_err(|e| Error::host(what(), e))?;
        self.0.lock().known.insert(pid);
        Ok(Child { pid, pidfd, children: Arc::clone(&self.0) })
    }
}

impl Drop for Expecting {
    fn drop(&mut self) {
        self.0.lock().expected -= 1;
        self.0.sweep();
    }
}

impl Child {
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Signals the process; nobody else, even when it has ended.
    ///
    /// # Errors
    /// The kernel's; `SRCH` for one that is gone.
    pub fn signal(&self, signal: u32) -> rustix::io::Result<()> {
        if signal == 0 {
            return Ok(());
        }
        let number = to_pid(signal).filter(|_| signal <= 64).ok_or(rustix::io::Errno::INVAL)?.as_raw_nonzero();
        // SAFETY: the signal is sent, not handled; those that the C library keeps for itself (32 to 34) mean something
        // inside a process only, and what the receiver does with one from outside is its own affair.
        let signal = unsafe { Signal::from_raw_nonzero_unchecked(number) };
        pidfd_send_signal(&self.pidfd, signal)
    }

    /// Waits for its end and reaps it. Needs a runtime; to be called once.
    pub async fn ended(&self) -> Ending {
        let pidfd = self.pidfd.try_clone().map(|fd| watched(fd, Interest::READABLE));
        match pidfd {
            Ok(Ok(pidfd)) => drop(pidfd.readable().await.map(|_| ())),
            Ok(Err(error)) => tracing::error!(pid = self.pid, %error, "a process cannot be watched"),
            Err(error) => tracing::error!(pid = self.pid, %error, "a process cannot be watched"),
        }
        // Not waiting here: the runtime may be ending, and not the process.
        let id = WaitId::PidFd(std::os::fd::AsFd::as_fd(&self.pidfd));
        let status = waitid(id, WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
        self.children.lock().known.remove(&self.pid);
        let Ok(Some(status)) = status else { return Ending::Unknown };
        let byte = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Ending::Exited(byte(code)),
            (None, Some(signal)) => Ending::Killed(byte(signal)),
            (None, None) => Ending::Unknown,
        }
    }
}

fn to_pid(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}
