//! The two bodies of a request: the client's, bounded in size and patience, and the answer's.
//!
//! Invariant of the answer: it ends without an error only if it is complete. hyper turns an error into a connection that
//! is cut (HTTP/1.1) or a stream that is reset (HTTP/2), so that no client takes a part for the whole.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::DropGuard;

use super::streams;
use super::visit::Visit;
use crate::guest::{BodyFault, Exchange, Failure};

/// What a client's body did wrong, for the status of the answer.
#[derive(Debug, Default)]
pub struct Verdict(AtomicU8);

impl Verdict {
    const TOO_LARGE: u8 = 1;
    const STALLED: u8 = 2;
    const BROKEN: u8 = 3;

    pub fn is_too_large(&self) -> bool {
        self.0.load(Ordering::Relaxed) == Self::TOO_LARGE
    }

    pub fn is_stalled(&self) -> bool {
        self.0.load(Ordering::Relaxed) == Self::STALLED
    }

    /// Its end did not come, or its chunks are none.
    pub fn is_broken(&self) -> bool {
        self.0.load(Ordering::Relaxed) == Self::BROKEN
    }
}

/// A request's body on its way to the guest.
pub struct ClientBody {
    body: Incoming,
    /// Bytes that may still come.
    left: u64,
    patience: Duration,
    /// Runs while the guest waits for the client.
    timer: Option<Pin<Box<Sleep>>>,
    verdict: Option<Arc<Verdict>>,
}

impl ClientBody {
    /// At most `max` bytes, none later than `patience` after the one before it.
    pub fn new(body: Incoming, max: u64, patience: Duration) -> (Self, Option<Arc<Verdict>>) {
        let verdict = (!body.is_end_stream()).then(Arc::<Verdict>::default);
        (Self { body, left: max, patience, timer: None, verdict: verdict.clone() }, verdict)
    }

    fn judge(&self, verdict: u8, fault: BodyFault) -> Poll<Option<Result<Frame<Bytes>, BodyFault>>> {
        if let Some(judged) = &self.verdict {
            judged.0.store(verdict, Ordering::Relaxed);
        }
        Poll::Ready(Some(Err(fault)))
    }

    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let patience = self.patience;
        self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience))).as_mut().poll(cx)
    }
}

impl Body for ClientBody {
    type Data = Bytes;
    type Error = BodyFault;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyFault>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
            ready!(self.poll_patience(cx));
            return self.judge(Verdict::STALLED, BodyFault::Stalled);
        };
        let patience = self.patience;
        if let Some(timer) = &mut self.timer {
            timer.as_mut().reset(Instant::now() + patience);
        }
        match frame {
            None => Poll::Ready(None),
            Some(Err(error)) => self.judge(Verdict::BROKEN, BodyFault::Client(error)),
            Some(Ok(frame)) => {
                let bytes = frame.data_ref().map_or(0, |data| data.len() as u64);
                match self.left.checked_sub(bytes) {
                    Some(left) => self.left = left,
                    None => return self.judge(Verdict::TOO_LARGE, BodyFault::TooLarge),
                }
                Poll::Ready(Some(Ok(frame)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body on its way to the client.
pub struct Answer {
    content: Content,
    visit: Visit,
}

enum Content {
    /// All of it is here, with the sum of its data. Trailers need the chunked coding, which a known length rules out.
    Whole { frames: VecDeque<Frame<Bytes>>, left: u64, has_trailers: bool },
    /// The guest is still writing.
    Stream { exchange: Arc<Exchange>, leash: Leash, left: Option<u64>, is_breaking_off: bool },
}

/// Stops the guest when its client leaves; a guest whose body was delivered may go on until its deadline.
#[derive(Default)]
pub struct Leash(Option<DropGuard>);

impl Leash {
    /// The guest stops when `guard` is dropped.
    pub fn new(guard: DropGuard) -> Self {
        Self(Some(guard))
    }

    fn let_go(&mut self) {
        if let Some(guard) = self.0.take() {
            drop(guard.disarm());
        }
    }
}

impl Answer {
    /// A complete body.
    pub fn whole(frames: VecDeque<Frame<Bytes>>, visit: Visit) -> Self {
        let left = frames.iter().filter_map(|frame| frame.data_ref()).map(|data| data.len() as u64).sum();
        let has_trailers = frames.back().is_some_and(Frame::is_trailers);
        let mut answer = Self { content: Content::Whole { frames, left, has_trailers }, visit };
        answer.note_end();
        answer
    }

    /// A text of our own.
    pub fn text(text: String, visit: Visit) -> Self {
        Self::whole(VecDeque::from([Frame::data(Bytes::from(text))]), visit)
    }

    /// A body that the guest still writes; `length` bytes, if it said so.
    pub fn stream(exchange: Arc<Exchange>, leash: Leash, length: Option<u64>, visit: Visit) -> Self {
        let content = Content::Stream { exchange, leash, left: length, is_breaking_off: false };
        let mut answer = Self { content, visit };
        answer.note_end();
        answer
    }

    /// The names of the trailers, if all is here and there are any.
    pub fn trailers(&self) -> Option<HeaderValue> {
        let Content::Whole { frames, has_trailers: true, .. } = &self.content else { return None };
        let names: Vec<_> = frames.back()?.trailers_ref()?.keys().map(HeaderName::as_str).collect();
        HeaderValue::from_str(&names.join(", ")).ok()
    }

    /// A body that the protocol forbids (HEAD, 204, 304) is delivered, and nobody is left for the guest to write to.
    fn note_end(&mut self) {
        if let Content::Stream { exchange, .. } = &self.content
            && self.visit.is_bodyless()
        {
            exchange.discard();
        }
        if self.is_end_stream() {
            self.delivered();
        }
    }

    fn delivered(&mut self) {
        self.visit.complete();
        if let Content::Stream { leash, .. } = &mut self.content {
            leash.let_go();
        }
    }

    fn note(&mut self, frame: &Option<Result<Frame<Bytes>, Failure>>) {
        match frame {
            None => self.delivered(),
            Some(Err(failure)) => self.visit.failed(failure),
            Some(Ok(frame)) => {
                let bytes = frame.data_ref().map_or(0, |data| data.len() as u64);
                self.visit.sent(bytes);
                match &mut self.content {
                    Content::Whole { left, .. } => *left -= bytes,
                    Content::Stream { left, .. } => *left = left.map(|left| left.saturating_sub(bytes)),
                }
                // hyper stops asking once the declared length is reached.
                if self.is_end_stream() || matches!(self.content, Content::Stream { left: Some(0), .. }) {
                    self.delivered();
                }
            }
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Failure;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Failure>>> {
        // hyper leaves out the body of an answer to HEAD in HTTP/1.1, but not in HTTP/2.
        if self.visit.is_bodyless() {
            return Poll::Ready(None);
        }
        let is_overdue = self.visit.is_overdue();
        let frame = match &mut self.content {
            _ if is_overdue => Some(Err(Failure::TimedOut)),
            Content::Whole { frames, .. } => frames.pop_front().map(Ok),
            Content::Stream { exchange, is_breaking_off, .. } => match exchange.poll_frame(cx) {
                // hyper throws away what it holds of an answer that fails, even the head; it sends that while it waits.
                Poll::Ready(Some(Err(_))) if !std::mem::replace(is_breaking_off, true) => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Poll::Ready(frame) => frame,
                Poll::Pending => {
                    streams::waits_for_guest();
                    return Poll::Pending;
                }
            },
        };
        streams::moved();
        self.note(&frame);
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.visit.is_bodyless()
            || match &self.content {
                Content::Whole { frames, .. } => frames.is_empty(),
                Content::Stream { .. } => false,
            }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole { has_trailers: true, .. } => SizeHint::default(),
            Content::Whole { left, .. } => SizeHint::with_exact(*left),
            Content::Stream { left, .. } => left.map_or_else(SizeHint::default, SizeHint::with_exact),
        }
    }
}
