//! The streams of an HTTP/2 connection, each with its own patience.
//!
//! A client that keeps its window closed stops one stream and nothing else: no write blocks, and the other streams go on.
//! So every stream has a clock, which runs while it waits for its client and stands while it waits for the guest. When it
//! has run for the idle timeout without a frame leaving, the stream is dropped, which resets it.
//!
//! hyper spawns streams through [`Streams`]; what a poll of one came to is noted by the body ([`waits_for_guest`],
//! [`moved`]) on the thread it runs on.

use std::cell::Cell;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::rt::Executor;
use tokio::time::{Instant, Sleep};
use tokio_util::task::TaskTracker;

thread_local! {
    /// What the stream that is being polled said of itself.
    static NOTED: Cell<Noted> = const { Cell::new(Noted::Nothing) };
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Noted {
    Nothing,
    Guest,
    Moved,
}

/// The stream that is being polled can go on only when its guest does.
pub fn waits_for_guest() {
    NOTED.set(Noted::Guest);
}

/// The stream that is being polled hands a frame to its connection.
pub fn moved() {
    NOTED.set(Noted::Moved);
}

/// Runs streams as tasks of their server, which waits for them.
#[derive(Clone)]
pub struct Streams {
    pub tasks: TaskTracker,
    /// How long a stream may wait for its client.
    pub patience: Duration,
}

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        drop(self.tasks.spawn(Patient { stream: Box::pin(stream), patience: self.patience, timer: None }));
    }
}

/// A stream under its clock.
struct Patient<F> {
    stream: Pin<Box<F>>,
    patience: Duration,
    /// Runs while the stream waits for its client.
    timer: Option<Pin<Box<Sleep>>>,
}

impl<F: Future> Future for Patient<F> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        NOTED.set(Noted::Nothing);
        if self.stream.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let until = Instant::now() + self.patience;
        match NOTED.replace(Noted::Nothing) {
            Noted::Guest => {
                self.timer = None;
                return Poll::Pending;
            }
            Noted::Moved => {
                if let Some(timer) = &mut self.timer {
                    timer.as_mut().reset(until);
                }
            }
            Noted::Nothing => {}
        }
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        ready!(timer.as_mut().poll(cx));
        tracing::debug!("a stream is reset: its client does not read");
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    const PATIENCE: Duration = Duration::from_millis(40);

    fn patient<F: Future>(stream: F) -> Patient<F> {
        Patient { stream: Box::pin(stream), patience: PATIENCE, timer: None }
    }

    #[tokio::test]
    async fn a_stream_that_waits_for_its_client_is_dropped() {
        let begun = Instant::now();
        patient(std::future::pending::<()>()).await;
        assert!(begun.elapsed() >= PATIENCE);
    }

    #[tokio::test]
    async fn one_that_waits_for_its_guest_is_not() {
        let guest = patient(poll_fn(|_| {
            waits_for_guest();
            Poll::<()>::Pending
        }));
        assert!(tokio::time::timeout(8 * PATIENCE, guest).await.is_err());
    }

    #[tokio::test]
    async fn a_frame_gives_it_new_patience() {
        let mut tick = tokio::time::interval(PATIENCE / 2);
        let slow = patient(poll_fn(move |cx| {
            if tick.poll_tick(cx).is_ready() {
                moved();
                // The next tick is waited for by the same poll.
                let _ = tick.poll_tick(cx);
            }
            Poll::<()>::Pending
        }));
        assert!(tokio::time::timeout(8 * PATIENCE, slow).await.is_err());
    }
}
