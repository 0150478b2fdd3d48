//! One request's answer on its way from the guest to the client.
//!
//! ```text
//! guest ── set(head, body) ──▶ Exchange ── poll_head ──▶ the connection writes the head
//!       ── frames ───────────▶          ── poll_frame ─▶ the connection writes the body
//!       ── settle(outcome) ──▶ what is left of the body, and whether it is complete
//! ```
//! Invariant: a body is complete only if the guest said so (`outgoing-body.finish`, WASI 0.2). That is looked up while its
//! store still lives: afterwards a dropped body looks like a finished one, and a chunked response cut by a trap would end
//! cleanly. Every other end is an error of the body, which the client sees as a cut connection.
//!
//! The guest's side is `serving.rs` and `service.rs`; the connection's side is `http`.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http::StatusCode;
use http::response::Parts;
use http_body::{Body, Frame};
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;
use wasmtime_wasi_http::{Error, p2, p3};

use super::exit::Outcome;

/// Why there is no answer of the guest's own, or none that is complete.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// It trapped, panicked or exited.
    #[error("the guest failed: {0}")]
    Trapped(String),
    /// Its container's memory limit was reached.
    #[error("{0}")]
    OutOfMemory(String),
    /// It returned without an answer, or without finishing its body.
    #[error("the guest returned without {0}")]
    Silent(&'static str),
    /// It answered with a status that only goes before an answer (RFC 9110, section 15.2).
    #[error("the guest answered with the status {0}, which cannot be the last")]
    Provisional(StatusCode),
    /// It answered with an error of `wasi:http` instead of a response.
    #[error("the guest answered with the error {0}")]
    Refused(String),
    /// Its outgoing request failed, and it passed the error on.
    #[error("the guest's upstream failed: {0}")]
    Upstream(String),
    /// There was no room for an instance.
    #[error("no room for an instance: {0}")]
    Crowded(String),
    /// It took longer than a request may.
    #[error("the request timed out")]
    TimedOut,
    /// It was stopped: its client left, or its container ended.
    #[error("the guest was stopped")]
    Stopped,
    /// The host's own mistake.
    #[error("the host failed: {0}")]
    Host(String),
}

/// Why a client's body breaks off.
#[derive(Debug, thiserror::Error)]
pub enum BodyFault {
    /// Larger than the server allows.
    #[error("the request's body is too large")]
    TooLarge,
    /// The client sends nothing any more.
    #[error("the client stopped sending")]
    Stalled,
    /// The connection failed.
    #[error("{0}")]
    Client(hyper::Error),
}

impl From<BodyFault> for Error {
    fn from(fault: BodyFault) -> Self {
        match fault {
            BodyFault::TooLarge => Self::HttpRequestBodySize(None),
            BodyFault::Stalled => Self::ConnectionReadTimeout,
            BodyFault::Client(error) => Self::Hyper(error),
        }
    }
}

/// The meeting point of one guest and one connection.
#[derive(Default)]
pub struct Exchange(Mutex<State>);

#[derive(Default)]
struct State {
    head: Option<Parts>,
    /// The guest's own body, while it writes it.
    body: Option<HyperOutgoingBody>,
    /// What was left of it when the guest ended.
    left: VecDeque<Frame<Bytes>>,
    end: Option<Result<(), Failure>>,
    /// The connection waits for a head, a frame or the end.
    reader: Option<Waker>,
    /// The guest waits until the connection has taken a frame.
    writer: Option<Waker>,
    /// What is held as long as more than so many bytes wait.
    place: Option<(Place, usize)>,
}

/// Whatever a request holds, and gives back by dropping it.
pub type Place = Box<dyn Send>;

/// Frames of a guest of WASI 0.3 that wait for a slow client; one of 0.2 counts its own.
const ROOM: usize = 4;

impl Exchange {
    /// An exchange nobody has answered.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Takes the head once it is there. A guest that has failed by then has no answer: as long as nothing was sent, the
    /// client can be told.
    pub fn poll_head(&self, cx: &Context<'_>) -> Poll<Result<Parts, Failure>> {
        let mut state = self.lock();
        if let Some(Err(failure)) = &state.end {
            return Poll::Ready(Err(failure.clone()));
        }
        match state.head.take() {
            Some(head) => Poll::Ready(Ok(head)),
            None if state.end.is_some() => Poll::Ready(Err(Failure::Silent("an answer"))),
            None => {
                state.wait(cx);
                Poll::Pending
            }
        }
    }

    /// The next frame of the body; `None` after a complete one.
    pub fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Failure>>> {
        let mut state = self.lock();
        if let Some(frame) = state.left.pop_front() {
            state.give_back();
            if let Some(writer) = state.writer.take() {
                writer.wake();
            }
            return Poll::Ready(Some(Ok(frame)));
        }
        match &state.end {
            Some(Ok(())) => return Poll::Ready(None),
            Some(Err(failure)) => return Poll::Ready(Some(Err(failure.clone()))),
            None => {}
        }
        state.wait(cx);
        let Some(body) = &mut state.body else { return Poll::Pending };
        match std::task::ready!(Pin::new(body).poll_frame(cx)) {
            Some(Ok(frame)) => Poll::Ready(Some(Ok(frame))),
            // The guest lives and finished its body.
            None => {
                state.body = None;
                state.end = Some(Ok(()));
                Poll::Ready(None)
            }
            Some(Err(_)) => {
                state.body = None;
                state.end = Some(Err(Failure::Silent("finishing the body")));
                Poll::Ready(Some(Err(Failure::Silent("finishing the body"))))
            }
        }
    }

    /// Everything, if the guest has ended and its whole body is here: the head's body needs no guest any more. With it comes
    /// the place that is held while it waits.
    pub fn take_whole(&self) -> Option<(VecDeque<Frame<Bytes>>, Option<Place>)> {
        let mut state = self.lock();
        if state.end != Some(Ok(())) {
            return None;
        }
        Some((std::mem::take(&mut state.left), state.place.take().map(|(place, _)| place)))
    }

    /// Nobody reads the body: a guest that goes on with it is told so.
    pub fn discard(&self) {
        let mut state = self.lock();
        state.body = None;
        state.left.clear();
        state.give_back();
        state.end.get_or_insert(Ok(()));
        if let Some(writer) = state.writer.take() {
            writer.wake();
        }
    }

    /// The guest answers: with a response, or an error instead of one.
    pub(super) fn set(&self, answer: Result<http::Response<HyperOutgoingBody>, p2::bindings::http::types::ErrorCode>) {
        let mut state = self.lock();
        match answer {
            Ok(response) => {
                let (head, body) = response.into_parts();
                state.head = Some(head);
                state.body = Some(body);
            }
            Err(code) => state.end = Some(Err(refused(&code.into()))),
        }
        state.wake();
    }

    /// The head of an answer whose body is pushed, frame by frame.
    pub(super) fn answer(&self, head: Parts) {
        let mut state = self.lock();
        state.head = Some(head);
        state.wake();
    }

    /// An error instead of an answer.
    pub(super) fn refuse(&self, code: p3::bindings::http::types::ErrorCode) {
        self.stop(refused(&code.into()));
    }

    /// A frame of the body; wait for room before the next.
    pub(super) fn push(&self, frame: Frame<Bytes>) {
        let mut state = self.lock();
        // Nobody is there for it any more.
        if state.end.is_none() {
            state.left.push_back(frame);
        }
        state.wake();
    }

    /// Waits until the client has taken enough; false when nobody takes more.
    pub(super) fn poll_room(&self, cx: &Context<'_>) -> Poll<bool> {
        let mut state = self.lock();
        if state.left.len() < ROOM || state.end.is_some() {
            return Poll::Ready(state.end.is_none());
        }
        state.writer = Some(cx.waker().clone());
        Poll::Pending
    }

    /// All frames were pushed.
    pub(super) fn complete(&self) {
        let mut state = self.lock();
        state.end.get_or_insert(Ok(()));
        state.wake();
    }

    /// The body broke off.
    pub(super) fn unfinished(&self) {
        self.stop(Failure::Silent("finishing the body"));
    }

    /// The guest has ended and its store still lives. Drains what it wrote.
    pub(super) fn settle(&self, outcome: &wasmtime::Result<()>) {
        let mut state = self.lock();
        let finished = state.drain();
        if state.end.is_none() {
            state.end = Some(match (outcome, finished) {
                // The body was complete before whatever happened afterwards.
                (_, Finished::Complete) => Ok(()),
                (Ok(()), Finished::Never) => Err(Failure::Silent("an answer")),
                (Ok(()), Finished::Unfinished) => Err(Failure::Silent("finishing the body")),
                (Err(error), Finished::Never | Finished::Unfinished) => Err(failed(error)),
            });
        }
        state.wake();
    }

    /// The guest will not go on, whatever state it was in.
    pub fn stop(&self, failure: Failure) {
        let mut state = self.lock();
        if state.end.is_none() {
            state.body = None;
            state.end = Some(Err(failure));
        }
        state.wake();
    }

    /// The guest has ended: `place`, which it held, is given back when at most `spare` bytes wait for the client.
    pub fn keep(&self, place: impl Send + 'static, spare: usize) {
        let mut state = self.lock();
        if state.waiting() > spare {
            state.place = Some((Box::new(place), spare));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How far a guest got with its body.
enum Finished {
    Complete,
    Unfinished,
    Never,
}

impl State {
    fn drain(&mut self) -> Finished {
        let Some(mut body) = self.body.take() else { return Finished::Never };
        let mut cx = Context::from_waker(Waker::noop());
        loop {
            match Pin::new(&mut body).poll_frame(&mut cx) {
                Poll::Ready(Some(Ok(frame))) => self.left.push_back(frame),
                Poll::Ready(None) => return Finished::Complete,
                Poll::Ready(Some(Err(_))) | Poll::Pending => return Finished::Unfinished,
            }
        }
    }

    fn waiting(&self) -> usize {
        self.left.iter().filter_map(|frame| frame.data_ref()).map(Bytes::len).sum()
    }

    fn give_back(&mut self) {
        if self.place.as_ref().is_some_and(|(_, spare)| self.waiting() <= *spare) {
            self.place = None;
        }
    }

    fn wait(&mut self, cx: &Context<'_>) {
        match &mut self.reader {
            Some(reader) => reader.clone_from(cx.waker()),
            None => self.reader = Some(cx.waker().clone()),
        }
    }

    fn wake(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

/// How a guest that ended with `error` failed its client.
pub(super) fn failed(error: &wasmtime::Error) -> Failure {
    if error.downcast_ref::<wasmtime::PoolConcurrencyLimitError>().is_some() {
        return Failure::Crowded(format!("{error:#}"));
    }
    match Outcome::of_error(error) {
        Outcome::OutOfMemory(text) => Failure::OutOfMemory(text),
        Outcome::Exited(code) => Failure::Trapped(format!("it exited with code {code}")),
        outcome => Failure::Trapped(outcome.note().unwrap_or("it ended").to_owned()),
    }
}

fn refused(code: &Error) -> Failure {
    use Error as Code;
    match code {
        Code::DnsTimeout
        | Code::DnsError { .. }
        | Code::DestinationNotFound
        | Code::DestinationUnavailable
        | Code::DestinationIpProhibited
        | Code::DestinationIpUnroutable
        | Code::ConnectionRefused
        | Code::ConnectionTerminated
        | Code::ConnectionTimeout
        | Code::ConnectionReadTimeout
        | Code::ConnectionWriteTimeout
        | Code::ConnectionLimitReached
        | Code::TlsProtocolError
        | Code::TlsCertificateError
        | Code::TlsAlertReceived { .. }
        | Code::HttpResponseIncomplete
        | Code::HttpResponseTimeout => Failure::Upstream(code.to_string()),
        _ => Failure::Refused(code.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(exchange: &Exchange) -> Poll<Option<Result<Frame<Bytes>, Failure>>> {
        exchange.poll_frame(&mut Context::from_waker(Waker::noop()))
    }

    /// An answer of three frames of ten bytes, whose guest has ended.
    fn answered() -> Arc<Exchange> {
        let exchange = Exchange::new();
        exchange.answer(http::Response::new(()).into_parts().0);
        (0..3).for_each(|_| exchange.push(Frame::data(Bytes::from_static(b"ten bytes!"))));
        exchange.complete();
        exchange
    }

    #[test]
    fn a_place_is_held_until_little_is_left() {
        let (place, exchange) = (Arc::new(()), answered());
        exchange.keep(Arc::clone(&place), 10);
        for held in [2, 1, 1] {
            assert!(matches!(next(&exchange), Poll::Ready(Some(Ok(_)))));
            assert_eq!(Arc::strong_count(&place), held);
        }
        assert!(matches!(next(&exchange), Poll::Ready(None)));
    }

    #[test]
    fn a_place_goes_with_the_whole_answer_and_with_nobody() {
        let (place, exchange) = (Arc::new(()), answered());
        exchange.keep(Arc::clone(&place), 0);
        let (frames, held) = exchange.take_whole().unwrap();
        assert_eq!((frames.len(), Arc::strong_count(&place)), (3, 2));
        drop(held);
        let exchange = answered();
        exchange.keep(Arc::clone(&place), 0);
        exchange.discard();
        assert_eq!(Arc::strong_count(&place), 1);
        // Little enough from the start.
        answered().keep(Arc::clone(&place), 30);
        assert_eq!(Arc::strong_count(&place), 1);
    }
}
