//! The tick that makes running guests yield.
//!
//! An OS thread, never a tokio task: a spinning guest may hold the very worker that drives the timers. It ticks only while
//! some guest is being polled and is parked otherwise, so that an idle daemon uses no CPU.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use tokio_util::sync::ReusableBoxFuture;

use super::engine::Engines;
use super::quota::{CpuTime, Turn};
use crate::error::{Error, Result};
use crate::sharded::Counter;
use crate::users::Identity;

/// Longest time a guest runs before it lets others run, and hears of its own end.
pub const TICK: Duration = Duration::from_millis(1);

/// Ticks before the thread goes to rest: short requests come and go, and waking it for each would cost more than they do.
const LINGER: u32 = 20;

/// The ticking thread; ends when dropped.
#[derive(Debug)]
pub struct Ticker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Guests being polled right now.
    running: Counter,
    /// The thread is, or is about to be, at rest: a guest that comes has to wake it.
    resting: AtomicBool,
    stop: AtomicBool,
}

impl Ticker {
    /// Starts the thread, at rest.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn start(engines: Engines) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("epoch".into())
            .stack_size(64 << 10)
            .spawn(move || theirs.tick(&engines))
            .map_err(|e| Error::host("start the epoch thread", e))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// What drives guests whose CPU time is added to `cpu`, which may make them wait, and whose files are accessed as `user`
    /// (the process itself, if none).
    pub fn driver(&self, cpu: Arc<CpuTime>, user: Option<Arc<Identity>>) -> Arc<Driver> {
        let thread = self.thread.as_ref().map(|thread| thread.thread().clone());
        Arc::new(Driver { shared: Arc::clone(&self.shared), thread, cpu, user, spare: Mutex::default() })
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("the epoch thread panicked");
            }
        }
    }
}

impl Shared {
    fn tick(&self, engines: &Engines) {
        let mut quiet = 0;
        while !self.stop.load(Ordering::Acquire) {
            quiet = if self.running.total() == 0 { quiet + 1 } else { 0 };
            if quiet > LINGER {
                self.rest();
                quiet = 0;
            }
            std::thread::sleep(TICK);
            engines.made().iter().for_each(wasmtime::Engine::increment_epoch);
        }
    }

    /// Sleeps until a guest comes. Of two, one sees the other: this one the guest, or the guest that this one rests.
    fn rest(&self) {
        self.resting.store(true, Ordering::SeqCst);
        if self.running.total() == 0 && !self.stop.load(Ordering::Acquire) {
            std::thread::park();
        }
        self.resting.store(false, Ordering::SeqCst);
    }
}

/// Drives guests of one container.
pub struct Driver {
    shared: Arc<Shared>,
    thread: Option<std::thread::Thread>,
    cpu: Arc<CpuTime>,
    user: Option<Arc<Identity>>,
    /// Memory for the next guest's future: two kilobytes are more than malloc has at hand.
    spare: Mutex<Option<Place>>,
}

/// Where a future is.
type Place<T = ()> = ReusableBoxFuture<'static, T>;

/// A guest's future under the tick.
pub struct Driven<T> {
    turn: Turn,
    clock: Clock,
    future: Place<T>,
    /// After the future: what that began may need its user to end.
    driver: Arc<Driver>,
}

/// How a poll is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// By the thread's CPU time: right for polls of any length, at the price of two system calls each.
    Cpu,
    /// By the clock on the wall: for polls that end within a turn, which are preempted on busy machines only (then the CPU's
    /// is taken for a while).
    Wall,
}

impl Driver {
    /// Wraps a guest's future.
    pub fn drive<T>(self: &Arc<Self>, future: impl Future<Output = T> + Send + 'static) -> Driven<T> {
        self.drive_in(Place::new(future))
    }

    /// The same, in the memory of one that has ended ([`Driven::retire`]).
    pub fn drive_next(self: &Arc<Self>, future: impl Future<Output = ()> + Send + 'static) -> Driven<()> {
        let spare = self.spare().take();
        self.drive_in(match spare {
            Some(mut place) => {
                place.set(future);
                place
            }
            None => Place::new(future),
        })
    }

    fn drive_in<T>(self: &Arc<Self>, future: Place<T>) -> Driven<T> {
        Driven { turn: Turn::default(), clock: Clock::Cpu, future, driver: Arc::clone(self) }
    }

    fn spare(&self) -> MutexGuard<'_, Option<Place>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guest is polled from here on.
    fn enter(&self) -> Left<'_> {
        self.shared.running.add(1);
        if self.shared.resting.load(Ordering::SeqCst)
            && let Some(thread) = &self.thread
        {
            thread.unpark();
        }
        Left(&self.shared)
    }
}

/// Counts the guest out again, also when the poll panics.
struct Left<'a>(&'a Shared);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        self.0.running.sub(1);
    }
}

impl<T> Driven<T> {
    /// Times the polls from here on with `clock`; at first with that of the CPU.
    pub fn time_by(&mut self, clock: Clock) {
        self.clock = clock;
    }
}

impl Driven<()> {
    /// Leaves the memory of a future that has ended to the next one.
    pub fn retire(self) {
        *self.driver.spare() = Some(self.future);
    }
}

impl<T> Future for Driven<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let Self { turn, clock, future, driver } = &mut *self;
        let cpu = &driver.cpu;
        if cpu.is_limited() {
            ready!(turn.poll(cpu, cx));
        }
        let clock = if cpu.wants_exactness() { Clock::Cpu } else { *clock };
        let _left = driver.enter();
        let _user = driver.user.as_deref().and_then(Identity::enter);
        match clock {
            Clock::Cpu => {
                let before = thread_cpu_time();
                let poll = future.poll(cx);
                cpu.add(thread_cpu_time().saturating_sub(before));
                poll
            }
            Clock::Wall => {
                let before = Instant::now();
                let poll = future.poll(cx);
                cpu.add_wall(before.elapsed());
                poll
            }
        }
    }
}

/// CPU time of this thread, by a system call.
pub(super) fn thread_cpu_time() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::task::Waker;

    use super::*;

    /// Ready when it is so; blocks, as a guest that computes.
    fn once(so: impl Fn() -> bool + Send + 'static) -> impl Future<Output = ()> + Send + 'static {
        poll_fn(move |_| {
            await_that(&so);
            Poll::Ready(())
        })
    }

    fn await_that(so: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !so() {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
    }

    fn poll(guest: &mut Driven<()>) -> Poll<()> {
        Pin::new(guest).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn it_rests_without_guests_and_wakes_for_one() {
        let ticker = Ticker::start(Engines::new()).unwrap();
        let driver = ticker.driver(Arc::default(), None);
        for _ in 0..20 {
            let shared = Arc::clone(&ticker.shared);
            await_that(|| shared.resting.load(Ordering::SeqCst));
            let mut guest = driver.drive_next(once(move || !shared.resting.load(Ordering::SeqCst)));
            assert!(poll(&mut guest).is_ready());
            assert_eq!(ticker.shared.running.total(), 0);
        }
    }

    #[test]
    fn a_future_that_has_ended_leaves_its_memory_to_the_next() {
        let ticker = Ticker::start(Engines::new()).unwrap();
        let driver = ticker.driver(Arc::default(), None);
        let ran = Arc::new(());
        for round in 0..3 {
            assert_eq!(driver.spare().is_some(), round > 0);
            let held = Arc::clone(&ran);
            let mut guest = driver.drive_next(async move { drop(held) });
            assert!(driver.spare().is_none());
            assert!(poll(&mut guest).is_ready());
            guest.retire();
            // Nothing of the guest is kept with it.
            assert_eq!(Arc::strong_count(&ran), 1);
        }
    }
}
