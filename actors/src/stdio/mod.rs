//! A container's standard streams: containerd's FIFOs, or files.
//!
//! ```text
//! guest ── p2 streams ──▶ Output ──▶ FIFO ──▶ containerd, ctr, nerdctl, kubelet
//! guest ◀── p2 streams ── Input  ◀── FIFO ◀── (CloseIO ends it)
//! ```
//!
//! Invariants: no call here blocks a thread; what a guest was told is written is in the pipe or in a buffer of at most
//! [`output::CHUNK`] bytes; both ends of a FIFO stay open, so that a reader may leave and come back (detach, attach) and
//! nobody dies of EPIPE. A stalled reader stalls its own guest and nobody else.

mod handover;
mod input;
mod lines;
mod output;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdRegisterError};

pub use input::Input;
pub(crate) use input::Reader;
pub(crate) use lines::Lines;
pub use output::Output;
pub(crate) use output::Writer;

use crate::error::{Error, Result};

/// Where the streams of a container go, as containerd names them; empty means none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioPaths {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    /// A terminal was asked for.
    pub terminal: bool,
}

/// The opened streams of one container, before a runtime drives them.
#[derive(Debug)]
pub struct Stdio {
    stdin: Option<input::Ends>,
    stdout: Sink,
    stderr: Sink,
}

/// What an output stream writes to.
#[derive(Debug)]
pub(crate) enum Sink {
    /// Nowhere.
    Null,
    /// A FIFO, opened for both directions so that it never breaks.
    Pipe(OwnedFd),
    /// A regular file, opened to append.
    File(File),
}

impl Stdio {
    /// Opens the streams. A FIFO that nobody else opens does not block.
    ///
    /// # Errors
    /// `Unsupported` for a scheme or a terminal, `Host` for a path that cannot be opened.
    pub fn open(paths: &StdioPaths) -> Result<Self> {
        if paths.terminal {
            return Err(Error::Unsupported("a terminal is not supported for wasm; run without -t/--tty".into()));
        }
        Self::open_any(paths)
    }

    /// The same where a terminal may be behind the streams.
    ///
    /// # Errors
    /// `Unsupported` for a scheme, `Host` for a path that cannot be opened.
    pub fn open_any(paths: &StdioPaths) -> Result<Self> {
        Ok(Self {
            stdin: if paths.stdin.is_empty() { None } else { Some(input::Ends::open(Path::new(&paths.stdin))?) },
            stdout: Sink::open(&paths.stdout)?,
            stderr: Sink::open(&paths.stderr)?,
        })
    }

    /// Hands the streams to the tokio runtime of the caller, which drives them from now on.
    ///
    /// # Errors
    /// When the runtime cannot watch a descriptor.
    pub fn attach(self) -> std::io::Result<Streams> {
        Ok(Streams {
            stdin: self.stdin.map(Input::new).transpose()?.map(Arc::new),
            stdout: Output::new(self.stdout)?,
            stderr: Output::new(self.stderr)?,
        })
    }

    /// What `CloseIO` pulls: the write end that keeps stdin open.
    pub fn stdin_keeper(&self) -> Option<Keeper> {
        self.stdin.as_ref().map(input::Ends::keeper)
    }
}

pub use input::Keeper;

/// The streams of a running guest.
#[derive(Debug, Clone)]
pub struct Streams {
    pub stdin: Option<Arc<Input>>,
    pub stdout: Arc<Output>,
    pub stderr: Arc<Output>,
}

impl Streams {
    /// Ends the streams: waits until everything the guest wrote has left our hands and is in those of a reader.
    pub async fn finish(self) {
        tokio::join!(finish(self.stdout), finish(self.stderr));
    }
}

/// The same for one stream.
pub(crate) async fn finish(output: Arc<Output>) {
    output.drain().await;
    // Nobody else has it any more: the guest's store is gone.
    if let Some(fifo) = Arc::into_inner(output).and_then(Output::into_fifo) {
        handover::hand_over(fifo).await;
    }
}

impl Sink {
    fn open(target: &str) -> Result<Self> {
        let path = match target.split_once("://") {
            None if target.is_empty() => return Ok(Self::Null),
            None => PathBuf::from(target),
            Some(("file" | "fifo", path)) => PathBuf::from(path),
            Some((scheme, _)) => {
                return Err(Error::Unsupported(format!(
                    "log URI {target}: scheme {scheme}:// is not supported; use file:// or a FIFO"
                )));
            }
        };
        let create = if target.starts_with("file://") { OFlags::CREATE } else { OFlags::empty() };
        let flags = OFlags::RDWR | OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC | create;
        let fd = open(&path, flags, Mode::from_raw_mode(0o644)).map_err(|e| Error::path("open", &path, e))?;
        let stat = fstat(&fd).map_err(|e| Error::path("stat", &path, e))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Fifo => Ok(Self::Pipe(fd)),
            FileType::RegularFile => Ok(Self::File(fd.into())),
            FileType::CharacterDevice => Ok(Self::File(fd.into())),
            other => Err(Error::Unsupported(format!("{}: output to a {other:?} is not supported", path.display()))),
        }
    }
}

/// A descriptor under the eyes of the caller's runtime.
pub(crate) fn watched(
    fd: OwnedFd,
    interest: Interest,
) -> std::result::Result<AsyncFd<OwnedFd>, AsyncFdRegisterError<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and stays the same descriptor until it is dropped, and the `AsyncFd` owns it.
    unsafe { AsyncFd::register_with_interest(fd, interest) }
}
