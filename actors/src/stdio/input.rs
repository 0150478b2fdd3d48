//! The input stream of a guest.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, Interest, ReadBuf};
use tokio::task::coop::consume_budget;
use wasmtime_wasi::cli::{IsTerminal, StdinStream};
use wasmtime_wasi::p2::{InputStream, Pollable, StreamError, StreamResult};

use crate::error::{Error, Result};

/// Most bytes handed to a guest by one read.
const MAX_READ: usize = 64 << 10;

/// Stdin before its guest runs.
#[derive(Debug)]
pub(super) struct Ends {
    path: PathBuf,
    read: OwnedFd,
    keeper: Keeper,
}

/// The write end that keeps a guest's stdin open until `CloseIO`, so that a client that detaches is not an end of file.
#[derive(Debug, Clone)]
pub struct Keeper(Arc<Mutex<Keep>>);

#[derive(Debug)]
enum Keep {
    /// The guest does not run yet.
    Pending,
    Open(#[expect(dead_code, reason = "held open, never used")] OwnedFd),
    Closed,
}

impl Keeper {
    /// Lets go: the guest reads an end of file once its client has closed as well. Twice is fine.
    pub fn close(&self) {
        *self.lock() = Keep::Closed;
    }

    fn lock(&self) -> MutexGuard<'_, Keep> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ends {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let read = open_end(path, OFlags::RDONLY).map_err(|e| Error::path("open stdin", path, e))?;
        Ok(Self { path: path.to_owned(), read, keeper: Keeper(Arc::new(Mutex::new(Keep::Pending))) })
    }

    pub(super) fn keeper(&self) -> Keeper {
        self.keeper.clone()
    }

    /// Opens the write end, at the start: a client whose input ended before (`echo x | ctr run`) has closed the FIFO by
    /// then and will never say `CloseIO`, and is not kept alive.
    fn keep(&self) -> io::Result<()> {
        let mut keep = self.keeper.lock();
        let stat = rustix::fs::fstat(&self.read)?;
        // Only a FIFO has a write end; a file or a device ends by itself.
        let fifo = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_fifo();
        if fifo && matches!(*keep, Keep::Pending) && !polled(&self.read).contains(PollFlags::HUP) {
            *keep = Keep::Open(open_end(&self.path, OFlags::WRONLY)?);
        }
        Ok(())
    }
}

fn open_end(path: &Path, end: OFlags) -> rustix::io::Result<OwnedFd> {
    open(path, end | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
}

/// What a read would meet, asked of the kernel.
fn polled(fd: &OwnedFd) -> PollFlags {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
        Ok(_) => fds[0].revents(),
        Err(_) => PollFlags::empty(),
    }
}

/// The stream that a guest reads from.
#[derive(Debug)]
pub struct Input {
    source: Source,
    /// Held so that the write end lives as long as the guest, unless `CloseIO` takes it.
    _keeper: Keeper,
}

#[derive(Debug)]
enum Source {
    Pipe(AsyncFd<OwnedFd>),
    /// Always ready: a file or `/dev/null`.
    File(OwnedFd),
}

impl Input {
    pub(super) fn new(ends: Ends) -> io::Result<Self> {
        ends.keep()?;
        let source = match super::watched(ends.read, Interest::READABLE) {
            Ok(fd) => Source::Pipe(fd),
            Err(refused) => match refused.into_parts() {
                (fd, error) if error.kind() == io::ErrorKind::PermissionDenied => Source::File(fd),
                (_, error) => return Err(error),
            },
        };
        Ok(Self { source, _keeper: ends.keeper })
    }

    fn fd(&self) -> &OwnedFd {
        match &self.source {
            Source::Pipe(fd) => fd.get_ref(),
            Source::File(fd) => fd,
        }
    }

    /// What is there now: `None` when nothing is, empty at the end.
    fn read(&self, size: usize) -> io::Result<Option<Bytes>> {
        let mut buffer = vec![0; size.min(MAX_READ)];
        match rustix::io::read(self.fd(), &mut buffer) {
            Ok(read) => {
                buffer.truncate(read);
                Ok(Some(buffer.into()))
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether a read would say something: tokio's memory of readiness may be stale, and a guest
    /// that is woken for nothing ten times in a row is trapped by wasmtime.
    fn has_news(&self) -> bool {
        !polled(self.fd()).is_empty()
    }

    fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        let Source::Pipe(fd) = &self.source else { return Poll::Ready(()) };
        loop {
            let Ok(mut guard) = ready!(fd.poll_read_ready(cx)) else { return Poll::Ready(()) };
            if self.has_news() {
                return Poll::Ready(());
            }
            guard.clear_ready();
        }
    }
}

/// One handle of a guest on an [`Input`].
pub(crate) struct Reader(pub Arc<Input>);

#[wasmtime_wasi::async_trait]
impl Pollable for Reader {
    async fn ready(&mut self) {
        // See `Writer`.
        consume_budget().await;
        std::future::poll_fn(|cx| self.0.poll_ready(cx)).await;
    }
}

#[wasmtime_wasi::async_trait]
impl InputStream for Reader {
    fn read(&mut self, size: usize) -> StreamResult<Bytes> {
        match self.0.read(size) {
            Ok(None) => Ok(Bytes::new()),
            Ok(Some(bytes)) if bytes.is_empty() && size > 0 => Err(StreamError::Closed),
            Ok(Some(bytes)) => Ok(bytes),
            Err(error) => Err(StreamError::LastOperationFailed(error.into())),
        }
    }
}

impl IsTerminal for Reader {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdinStream for Reader {
    fn async_stream(&self) -> Box<dyn AsyncRead + Send + Sync> {
        Box::new(Self(Arc::clone(&self.0)))
    }

    fn p2_stream(&self) -> Box<dyn InputStream> {
        Box::new(Self(Arc::clone(&self.0)))
    }
}

/// Used by WASI 0.3 only; same rules, in tokio's words.
impl AsyncRead for Reader {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_ready(cx));
            if let Some(bytes) = self.0.read(out.remaining())? {
                out.put_slice(&bytes);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use rustix::fs::{CWD, FileType, mknodat};

    use super::*;

    fn fifo() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stdin");
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        (dir, path)
    }

    fn client(path: &Path) -> std::fs::File {
        std::fs::File::options().write(true).open(path).unwrap()
    }

    #[tokio::test]
    async fn a_client_that_detaches_is_no_end_of_file_until_close_io() {
        let (_dir, path) = fifo();
        let ends = Ends::open(&path).unwrap();
        let (keeper, mut client) = (ends.keeper(), client(&path));
        let input = Input::new(ends).unwrap();
        client.write_all(b"one").unwrap();
        drop(client);
        assert_eq!(input.read(10).unwrap().unwrap(), "one");
        assert_eq!(input.read(10).unwrap(), None, "detached");
        keeper.close();
        keeper.close();
        assert_eq!(input.read(10).unwrap().unwrap(), "", "closed");
    }

    #[tokio::test]
    async fn input_that_ended_before_the_start_has_an_end() {
        let (_dir, path) = fifo();
        let ends = Ends::open(&path).unwrap();
        client(&path).write_all(b"one").unwrap();
        let input = Input::new(ends).unwrap();
        assert_eq!(input.read(10).unwrap().unwrap(), "one");
        assert_eq!(input.read(10).unwrap().unwrap(), "");
    }

    #[tokio::test]
    async fn a_client_may_come_after_the_start() {
        let (_dir, path) = fifo();
        let input = Input::new(Ends::open(&path).unwrap()).unwrap();
        assert_eq!(input.read(10).unwrap(), None);
        client(&path).write_all(b"late").unwrap();
        assert_eq!(input.read(10).unwrap().unwrap(), "late");
    }

    #[tokio::test]
    async fn close_io_before_the_start_is_remembered() {
        let (_dir, path) = fifo();
        let ends = Ends::open(&path).unwrap();
        ends.keeper().close();
        let client = client(&path);
        let input = Input::new(ends).unwrap();
        drop(client);
        assert_eq!(input.read(10).unwrap().unwrap(), "");
    }
}
