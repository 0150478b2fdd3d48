//! The input stream of a guest.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
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

/// Both ends of stdin's FIFO. The write end is ours to hold, so that a client that detaches is not an end of file.
#[derive(Debug)]
pub(super) struct Ends {
    read: OwnedFd,
    keeper: Keeper,
}

/// The write end that keeps a guest's stdin open until `CloseIO`.
#[derive(Debug, Clone)]
pub struct Keeper(Arc<Mutex<Option<OwnedFd>>>);

impl Keeper {
    /// Lets go: the guest reads an end of file once its client has closed as well. Twice is fine.
    pub fn close(&self) {
        drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Ends {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let open = |end| open(path, flags | end, Mode::empty()).map_err(|e| Error::path("open stdin", path, e));
        let read = open(OFlags::RDONLY)?;
        // Only a FIFO has a write end to keep; a file or a device ends by itself.
        let stat = rustix::fs::fstat(&read).map_err(|e| Error::path("stat stdin", path, e))?;
        let fifo = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_fifo();
        let write = if fifo { Some(open(OFlags::WRONLY)?) } else { None };
        Ok(Self { read, keeper: Keeper(Arc::new(Mutex::new(write))) })
    }

    pub(super) fn keeper(&self) -> Keeper {
        self.keeper.clone()
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

    /// Whether a read would say something, asked of the kernel: tokio's memory of readiness may be stale, and a guest
    /// that is woken for nothing ten times in a row is trapped by wasmtime.
    fn has_news(&self) -> bool {
        let mut fds = [PollFd::new(self.fd(), PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
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
