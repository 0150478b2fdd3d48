//! One process of a native container: its first, or one that was executed in it.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::termios::{Winsize, tcsetwinsize};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::children::{Child, Ending};
use super::io::{Copies, Wired};
use crate::error::{Error, Result};
use crate::stdio::Keeper;

/// The process, with what hangs on it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// The terminal's master, if it has one.
    console: Option<OwnedFd>,
    stdin: Option<Keeper>,
    /// Until they are copied.
    wired: Mutex<Option<Wired>>,
    copies: OnceLock<Copies>,
    /// Cuts the copies off.
    closing: CancellationToken,
}

impl Process {
    /// Takes over what runc has left.
    ///
    /// # Errors
    /// What kept its streams from being wired; it is killed then.
    pub(super) fn new(child: Child, wired: Result<Wired>, closing: CancellationToken) -> Result<Self> {
        let wired = wired.inspect_err(|_| {
            // One that has ended already is as good.
            let _ = child.signal(super::SIGKILL);
        })?;
        let console = wired.console().map_err(|e| Error::host("keep the terminal", e))?;
        let stdin = wired.stdin_keeper();
        Ok(Self { child, console, stdin, wired: Mutex::new(Some(wired)), copies: OnceLock::new(), closing })
    }

    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// What `CloseIO` pulls.
    pub fn stdin_keeper(&self) -> Option<Keeper> {
        self.stdin.clone()
    }

    pub(super) fn closing(&self) -> &CancellationToken {
        &self.closing
    }

    /// Begins to copy its streams, once.
    pub(super) fn copy(&self, runtime: &Handle) -> Result<()> {
        let Some(wired) = self.wired.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
        let _inside = runtime.enter();
        let copies = wired.copy(&self.closing).map_err(|e| Error::host("copy the streams", e))?;
        // It is empty: only one can have taken the streams.
        drop(self.copies.set(copies));
        Ok(())
    }

    /// Signals it.
    ///
    /// # Errors
    /// `Host` for one that is gone.
    pub fn signal(&self, signal: u32) -> Result<()> {
        match self.child.signal(signal) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::INVAL) => {
                Err(Error::invalid(format!("signal {signal}: there is none of this number")))
            }
            Err(error) => Err(Error::host(format!("signal process {}", self.pid()), error)),
        }
    }

    /// Waits for its end and reaps it. Once.
    pub async fn ended(&self) -> Ending {
        self.child.ended().await
    }

    /// After its end: waits until its output is with the readers.
    pub async fn complete(&self) {
        if let Some(copies) = self.copies.get() {
            copies.complete().await;
        }
    }

    /// Stops copying: nobody is interested in it any more.
    pub fn close(&self) {
        self.closing.cancel();
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// `Invalid` without one.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let console = self.console.as_ref().ok_or_else(|| Error::invalid("resize: the process has no terminal"))?;
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(console, size).map_err(|e| Error::host("resize the terminal", e))
    }
}

/// The number that runc has written. Blocks.
pub(super) fn read_pid(file: &Path) -> Result<u32> {
    let text = std::fs::read_to_string(file).map_err(|e| Error::path("read", file, e))?;
    text.trim().parse().map_err(|_| Error::path("read", file, std::io::Error::other(format!("{text:?} is no pid"))))
}
