//! The output of one request, line by line.
//!
//! Many requests of a container write to the same stream at the same time. Each has a [`Lines`] of its own, which hands
//! over whole lines only, so that no line has two authors. A line longer than [`LONGEST`] goes in pieces.
//!
//! Made by `guest`, one for each request that writes anything.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::io::AsyncWrite;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamError, StreamResult};

use super::Output;
use super::output::Writer;

/// Bytes that wait for their line's end.
const LONGEST: usize = 8 << 10;

/// One request's end of an output stream.
#[derive(Debug, Clone)]
pub(crate) struct Lines(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    output: Arc<Output>,
    /// Written before each line.
    prefix: Option<String>,
    unfinished: Mutex<Vec<u8>>,
}

impl Lines {
    /// Lines for `output`, each after `prefix`.
    pub fn new(output: Arc<Output>, prefix: Option<String>) -> Self {
        Self(Arc::new(Shared { output, prefix, unfinished: Mutex::default() }))
    }

    fn write(&self, bytes: &[u8]) -> StreamResult<()> {
        let mut unfinished = self.0.unfinished();
        unfinished.extend_from_slice(bytes);
        let end = match unfinished.iter().rposition(|byte| *byte == b'\n') {
            Some(at) => at + 1,
            None if unfinished.len() >= LONGEST => unfinished.len(),
            None => return Ok(()),
        };
        let whole = self.0.prefixed(&unfinished[..end]);
        let written = self.0.output.write(&whole);
        unfinished.drain(..end);
        written
    }

    fn writer(&self) -> Writer {
        Writer(Arc::clone(&self.0.output))
    }
}

impl Shared {
    fn unfinished(&self) -> MutexGuard<'_, Vec<u8>> {
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn prefixed<'a>(&self, text: &'a [u8]) -> std::borrow::Cow<'a, [u8]> {
        let Some(prefix) = &self.prefix else { return text.into() };
        let lines = text.split_inclusive(|byte| *byte == b'\n');
        lines.flat_map(|line| [prefix.as_bytes(), line].concat()).collect::<Vec<_>>().into()
    }
}

impl Drop for Shared {
    /// The request is over: its last line ends here, unless the reader is so far behind that it would pile up.
    fn drop(&mut self) {
        let mut last = std::mem::take(&mut *self.unfinished());
        if last.is_empty() {
            return self.output.drain_later();
        }
        last.push(b'\n');
        if self.output.has_room() {
            let last = self.prefixed(&last);
            // Nobody is left to hear of a broken stream.
            let _ = self.output.write(&last);
        }
        self.output.drain_later();
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Lines {
    async fn ready(&mut self) {
        self.writer().ready().await;
    }
}

#[wasmtime_wasi::async_trait]
impl OutputStream for Lines {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        Self::write(self, &bytes)
    }

    fn flush(&mut self) -> StreamResult<()> {
        self.writer().flush()
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        self.0.output.permit()
    }
}

impl IsTerminal for Lines {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Lines {
    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }

    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }
}

/// For WASI 0.3.
impl AsyncWrite for Lines {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        std::task::ready!(Pin::new(&mut self.writer()).poll_flush(cx))?;
        let taken = bytes.len().min(super::output::CHUNK);
        Poll::Ready(match Self::write(&self, &bytes[..taken]) {
            Ok(()) => Ok(taken),
            Err(StreamError::Closed | StreamError::LastOperationFailed(_) | StreamError::Trap(_)) => {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        })
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stdio::Sink;

    #[tokio::test]
    async fn lines_of_two_requests_do_not_mix() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let output = Output::new(Sink::File(file.reopen().unwrap())).unwrap();
        let (one, two) = (Lines::new(output.clone(), Some("[1] ".into())), Lines::new(output.clone(), None));
        one.write(b"a").unwrap();
        two.write(b"b\nb").unwrap();
        one.write(b"a\naa\naaa").unwrap();
        drop(two);
        drop(one);
        output.drain().await;
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert_eq!(text, "b\n[1] aa\n[1] aa\nb\n[1] aaa\n", "{text:?}");
    }
}
