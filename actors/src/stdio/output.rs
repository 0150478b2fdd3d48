//! One output stream of a guest.
//!
//! A write goes straight into the pipe while it takes bytes; the rest waits in `pending`, and the guest is told to wait
//! until that is gone. A file takes its bytes on a blocking thread.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::io::{AsyncWrite, Interest};
use tokio::task::coop::consume_budget;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamError, StreamResult};

use super::Sink;

/// What a guest may hand over before it has to wait, in bytes: the size of a pipe.
pub(crate) const CHUNK: usize = 64 << 10;

/// Lines of our own that may wait for the reader, in bytes: some tenths of a second of a busy server's access log.
const BACKLOG: usize = 1 << 20;

/// A stream that a guest writes to.
#[derive(Debug)]
pub struct Output {
    target: Target,
    state: Arc<Mutex<State>>,
    /// Held by whoever writes to a file; the bytes stay pending until they are written.
    writer: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug)]
enum Target {
    Null,
    Pipe(AsyncFd<OwnedFd>),
    File(Arc<File>),
}

#[derive(Debug, Default)]
struct State {
    /// Accepted from the guest, not yet written.
    pending: VecDeque<u8>,
    /// The target failed; the guest is told once, then the stream is closed.
    failed: Option<io::Error>,
    closed: bool,
}

impl Output {
    pub(super) fn new(sink: Sink) -> io::Result<Arc<Self>> {
        let target = match sink {
            Sink::Null => Target::Null,
            Sink::Pipe(fd) => Target::Pipe(super::watched(fd, Interest::WRITABLE)?),
            Sink::File(file) => Target::File(Arc::new(file)),
        };
        Ok(Arc::new(Self { target, state: Arc::default(), writer: Arc::default() }))
    }

    /// Waits until nothing is pending. Cancel safe.
    pub async fn drain(&self) {
        match &self.target {
            Target::Null => {}
            Target::Pipe(fd) => self.drain_pipe(fd).await,
            Target::File(file) => self.drain_file(file).await,
        }
    }

    /// Appends `text` for the reader of the container's log, after what the guest wrote. The caller drains.
    pub fn note(&self, text: &str) {
        let mut state = self.lock();
        if !matches!(self.target, Target::Null) && !state.closed {
            state.pending.extend(text.as_bytes());
        }
    }

    /// Writes a line of our own among the guest's; false when the reader is so far behind that it is lost, for nobody waits
    /// for it here.
    pub fn line(self: &Arc<Self>, text: &str) -> bool {
        let fits = self.lock().pending.len() < BACKLOG;
        if fits {
            // A stream that is broken is told to whoever writes to it for a guest.
            let _ = self.write(text.as_bytes());
        }
        self.drain_later();
        fits
    }

    /// Writes all of it, waiting for the reader; lost when the stream is broken.
    pub(crate) async fn put(&self, bytes: &[u8]) {
        if self.write(bytes).is_ok() {
            self.drain().await;
        }
    }

    /// Both ends of its FIFO, if it is one.
    pub(super) fn into_fifo(self) -> Option<OwnedFd> {
        match self.target {
            Target::Pipe(fd) => Some(fd.into_inner()),
            Target::Null | Target::File(_) => None,
        }
    }

    async fn drain_pipe(&self, fd: &AsyncFd<OwnedFd>) {
        while self.is_pending() {
            match fd.writable().await {
                Ok(guard) => self.write_some(fd.get_ref(), guard),
                Err(error) => self.fail(error),
            }
        }
    }

    fn write_some(&self, fd: &OwnedFd, mut guard: AsyncFdReadyGuard<'_, OwnedFd>) {
        let mut state = self.lock();
        match state.write_pending(fd) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
            Err(error) => state.fail(error),
        }
    }

    async fn drain_file(&self, file: &Arc<File>) {
        let mut writing = Arc::clone(&self.writer).lock_owned().await;
        while self.is_pending() {
            let (state, file) = (Arc::clone(&self.state), Arc::clone(file));
            // The thread itself notes what is written and lets go: whoever waits here may be dropped meanwhile, as a guest
            // that is killed, and the next must not write the same again.
            let written = tokio::task::spawn_blocking(move || {
                write_pending(&state, &file);
                writing
            });
            match written.await {
                Ok(held) => writing = held,
                Err(error) => return self.fail(io::Error::other(error)),
            }
        }
    }

    /// Writes what the target takes now; the rest is pending.
    pub(super) fn write(&self, bytes: &[u8]) -> StreamResult<()> {
        let mut state = self.lock();
        state.check()?;
        let mut rest = bytes;
        if let (Target::Pipe(fd), true) = (&self.target, state.pending.is_empty()) {
            match rustix::io::write(fd.get_ref(), rest) {
                Ok(written) => rest = &rest[written..],
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(error) => state.fail(error.into()),
            }
        }
        if !matches!(self.target, Target::Null) {
            state.pending.extend(rest);
        }
        Ok(())
    }

    /// Bytes the guest may write now; zero is "wait".
    pub(super) fn permit(&self) -> StreamResult<usize> {
        let mut state = self.lock();
        state.check()?;
        Ok(if state.pending.is_empty() { CHUNK } else { 0 })
    }

    /// Whether less than a chunk waits to be written.
    pub(super) fn has_room(&self) -> bool {
        self.lock().pending.len() < CHUNK
    }

    /// Sees to it that what is pending gets written though its author is gone.
    pub(super) fn drain_later(self: &Arc<Self>) {
        if self.is_pending()
            && let Some(runtime) = crate::users::home()
        {
            let output = Arc::clone(self);
            drop(runtime.spawn(async move { output.drain().await }));
        }
    }

    fn is_pending(&self) -> bool {
        !self.lock().pending.is_empty()
    }

    fn fail(&self, error: io::Error) {
        self.lock().fail(error);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes what is pending to a file, while others may add to it.
fn write_pending(state: &Mutex<State>, mut file: &File) {
    let bytes: Vec<u8> = lock(state).pending.iter().copied().collect();
    let written = file.write_all(&bytes);
    let mut state = lock(state);
    match written {
        Ok(()) => drop(state.pending.drain(..bytes.len())),
        Err(error) => state.fail(error),
    }
}

impl State {
    fn write_pending(&mut self, fd: &OwnedFd) -> io::Result<()> {
        while !self.pending.is_empty() {
            let written = rustix::io::write(fd, self.pending.as_slices().0)?;
            self.pending.drain(..written);
        }
        // A burst must not hold its memory for the rest of the container's life.
        self.pending.shrink_to(0);
        Ok(())
    }

    fn fail(&mut self, error: io::Error) {
        self.pending = VecDeque::new();
        self.failed = Some(error);
    }

    fn check(&mut self) -> StreamResult<()> {
        if let Some(error) = self.failed.take() {
            self.closed = true;
            return Err(StreamError::LastOperationFailed(error.into()));
        }
        if self.closed { Err(StreamError::Closed) } else { Ok(()) }
    }
}

/// One handle of a guest on an [`Output`].
pub(crate) struct Writer(pub Arc<Output>);

#[wasmtime_wasi::async_trait]
impl Pollable for Writer {
    async fn ready(&mut self) {
        // A reader that is fast enough never makes a guest wait; let others run all the same.
        consume_budget().await;
        self.0.drain().await;
    }
}

#[wasmtime_wasi::async_trait]
impl OutputStream for Writer {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.0.write(&bytes)
    }

    fn flush(&mut self) -> StreamResult<()> {
        self.0.lock().check()
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        self.0.permit()
    }
}

impl IsTerminal for Writer {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Writer {
    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(Self(Arc::clone(&self.0)))
    }

    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(Self(Arc::clone(&self.0)))
    }
}

/// Used by WASI 0.3 only; same rules, in tokio's words.
impl AsyncWrite for Writer {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        std::task::ready!(self.as_mut().poll_flush(cx))?;
        let taken = bytes.len().min(CHUNK);
        let written = self.0.write(&bytes[..taken]);
        Poll::Ready(written.map(|()| taken).map_err(|_| io::ErrorKind::BrokenPipe.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.0.is_pending() {
            match &self.0.target {
                Target::Null => {}
                Target::Pipe(fd) => match std::task::ready!(fd.poll_write_ready(cx)) {
                    Ok(guard) => self.0.write_some(fd.get_ref(), guard),
                    Err(error) => self.0.fail(error),
                },
                Target::File(file) => {
                    // Somebody else is at it.
                    let Ok(_writing) = self.0.writer.try_lock() else { break };
                    let mut state = self.0.lock();
                    let written = (&**file).write_all(state.pending.make_contiguous());
                    state.pending.clear();
                    written?;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, pipe};

    use super::*;

    /// The pipe stands for a slow file: writing it takes as long as nobody reads.
    #[tokio::test]
    async fn what_is_being_written_when_its_guest_is_killed_is_written_once() {
        let text: Vec<u8> = (0..3 * CHUNK).map(|index| (index % 251) as u8).collect();
        let (mut reader, writer) = pipe().unwrap();
        let output = Output::new(Sink::File(File::from(OwnedFd::from(writer)))).unwrap();
        output.write(&text).unwrap();
        let mut first = [0];
        tokio::select! {
            biased;
            () = output.drain() => panic!("it fits"),
            // Once there is a byte the thread is at it; then the one who waits is dropped.
            read = tokio::task::spawn_blocking(move || reader.read_exact(&mut first).map(|()| reader)) => reader = read.unwrap().unwrap(),
        }
        let rest = tokio::task::spawn_blocking(move || {
            let mut rest = Vec::new();
            reader.read_to_end(&mut rest).map(|_| rest)
        });
        output.drain().await;
        drop(output);
        assert!(rest.await.unwrap().unwrap() == text[1..]);
    }
}
