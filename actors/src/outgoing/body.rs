//! The bodies of an exchange: what goes up is watched, what comes down is timed.
//!
//! ```text
//!  guest's body ─▶ Upload ─▶ connection        Upload tells Watch: whose turn it is, since when, how it ended
//!  guest ◀─ ResponseBody ◀─ connection         ResponseBody gives up after `between_bytes` of silence
//! ```
//! Neither buffers: a frame is asked for when the other side has taken the one before.

use std::pin::Pin;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http::header::CONTENT_LENGTH;
use http_body::{Body, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep};

use super::failure::{BoxError, Failure};

/// The body of a request, as the guest writes it.
pub type RequestBody = UnsyncBoxBody<Bytes, BoxError>;

/// Whose turn it is to do something about a request's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// The connection waits for the next piece.
    Guest,
    /// The connection has not taken the last piece yet.
    Server,
    /// All of it is with the connection: the response is due.
    Response,
}

/// What is known of a request's body from outside.
#[derive(Debug)]
pub(super) struct Watch {
    start: Instant,
    turn: AtomicU8,
    /// When the turn last changed, in nanoseconds since `start`.
    since: AtomicU64,
    /// The guest's own error, for the first who asks.
    error: Mutex<Option<BoxError>>,
}

impl Watch {
    fn new(turn: Turn) -> Arc<Self> {
        let turn = AtomicU8::new(turn as u8);
        Arc::new(Self { start: Instant::now(), turn, since: AtomicU64::new(0), error: Mutex::default() })
    }

    pub(super) fn turn(&self) -> Turn {
        match self.turn.load(Ordering::Relaxed) {
            turn if turn == Turn::Guest as u8 => Turn::Guest,
            turn if turn == Turn::Server as u8 => Turn::Server,
            _ => Turn::Response,
        }
    }

    /// When something last happened to the body.
    pub(super) fn since(&self) -> Instant {
        self.start + Duration::from_nanos(self.since.load(Ordering::Relaxed))
    }

    /// The error with which the guest's body ended, once.
    pub(super) fn take_error(&self) -> Option<BoxError> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn pass(&self, turn: Turn) {
        if self.turn.swap(turn as u8, Ordering::Relaxed) != turn as u8 || turn == Turn::Server {
            let nanos = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.since.store(nanos, Ordering::Relaxed);
        }
    }
}

/// The body of a request on its way into a connection.
pub(super) struct Upload {
    body: RequestBody,
    watch: Arc<Watch>,
    /// What the request's content-length leaves to send: the connection takes no more and drops the body then.
    left: Option<u64>,
    /// Told when all of it is with the connection; dropped when it never will be.
    sent: Option<oneshot::Sender<()>>,
}

impl Upload {
    /// Watches `body`; the receiver learns whether all of it was sent.
    pub(super) fn new(body: RequestBody, headers: &HeaderMap) -> (Self, Arc<Watch>, oneshot::Receiver<()>) {
        let left = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        let empty = body.is_end_stream() || left == Some(0);
        let watch = Watch::new(if empty { Turn::Response } else { Turn::Guest });
        let (sent, all_sent) = oneshot::channel();
        let mut upload = Self { body, watch: Arc::clone(&watch), left, sent: Some(sent) };
        if empty {
            upload.complete();
        }
        (upload, watch, all_sent)
    }

    fn complete(&mut self) {
        self.watch.pass(Turn::Response);
        if let Some(sent) = self.sent.take() {
            // An error means that nobody wants to know.
            let _unheard = sent.send(());
        }
    }

    fn took(&mut self, frame: &Frame<Bytes>) {
        self.watch.pass(Turn::Server);
        let length = frame.data_ref().map_or(0, |data| data.len() as u64);
        self.left = self.left.map(|left| left.saturating_sub(length));
        if frame.is_trailers() || self.body.is_end_stream() || self.left == Some(0) {
            self.complete();
        }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = Failure;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Failure>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        Poll::Ready(match polled {
            Poll::Pending => {
                self.watch.pass(Turn::Guest);
                return Poll::Pending;
            }
            Poll::Ready(None) => {
                self.complete();
                None
            }
            Poll::Ready(Some(Ok(frame))) => {
                self.took(&frame);
                Some(Ok(frame))
            }
            Poll::Ready(Some(Err(error))) => {
                self.sent = None;
                *self.watch.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                // For hyper only: whoever waits for the response takes the guest's own.
                Some(Err(Failure::Terminated))
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of a response.
#[derive(Debug)]
pub struct ResponseBody {
    /// `None` once it has failed: the connection is let go at once.
    incoming: Option<Incoming>,
    between_bytes: Duration,
    /// Runs while somebody waits for a piece.
    silence: Option<Pin<Box<Sleep>>>,
}

impl ResponseBody {
    pub(super) fn new(incoming: Incoming, between_bytes: Duration) -> Self {
        Self { incoming: Some(incoming), between_bytes, silence: None }
    }

    fn fail(&mut self, failure: Failure) -> Poll<Option<Result<Frame<Bytes>, Failure>>> {
        tracing::debug!(%failure, "the body of a response failed");
        self.incoming = None;
        Poll::Ready(Some(Err(failure)))
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Failure;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Failure>>> {
        let Some(incoming) = &mut self.incoming else { return Poll::Ready(None) };
        match Pin::new(incoming).poll_frame(cx) {
            Poll::Ready(frame) => {
                self.silence = None;
                match frame.transpose() {
                    Ok(frame) => Poll::Ready(frame.map(Ok)),
                    Err(error) => self.fail(Failure::of_body(&error)),
                }
            }
            Poll::Pending => {
                let between_bytes = self.between_bytes;
                let silence = self.silence.get_or_insert_with(|| Box::pin(tokio::time::sleep(between_bytes)));
                match silence.as_mut().poll(cx) {
                    Poll::Ready(()) => self.fail(Failure::ReadTimeout),
                    Poll::Pending => Poll::Pending,
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.as_ref().map_or_else(SizeHint::default, Incoming::size_hint)
    }
}
