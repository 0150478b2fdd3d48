//! The tick that makes running guests yield.
//!
//! An OS thread, never a tokio task: a spinning guest may hold the very worker that drives the timers. It ticks only while
//! some guest is being polled and is parked otherwise, so that an idle daemon uses no CPU.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::engine::Engines;
use super::quota::{CpuTime, Turn};
use crate::error::{Error, Result};
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
    running: AtomicUsize,
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

    /// Wraps a guest's future: while it is polled the epochs tick, and its CPU time is added to `cpu`, which may make it
    /// wait.
    pub fn drive<T>(&self, cpu: Arc<CpuTime>, future: impl Future<Output = T> + Send + 'static) -> Driven<T> {
        let thread = self.thread.as_ref().map(|thread| thread.thread().clone());
        Driven {
            running: Running { shared: Arc::clone(&self.shared), thread },
            cpu,
            turn: Turn::default(),
            clock: Clock::Cpu,
            future: Box::pin(future),
            user: None,
        }
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
            quiet = if self.running.load(Ordering::Acquire) == 0 { quiet + 1 } else { 0 };
            if quiet > LINGER {
                std::thread::park();
                quiet = 0;
            }
            std::thread::sleep(TICK);
            engines.made().iter().for_each(wasmtime::Engine::increment_epoch);
        }
    }
}

/// A guest's future under the tick.
pub struct Driven<T> {
    running: Running,
    cpu: Arc<CpuTime>,
    turn: Turn,
    clock: Clock,
    future: Pin<Box<dyn Future<Output = T> + Send>>,
    /// Whose files it sees, if they are not the process's own. After the future: what that began may need it to end.
    user: Option<Arc<Identity>>,
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

struct Running {
    shared: Arc<Shared>,
    thread: Option<std::thread::Thread>,
}

impl Running {
    fn enter(&self) -> Left<'_> {
        if self.shared.running.fetch_add(1, Ordering::AcqRel) == 0
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
        self.0.running.fetch_sub(1, Ordering::AcqRel);
    }
}

impl<T> Driven<T> {
    /// Has its file operations done as this user.
    pub fn with_files_of(mut self, user: Option<Arc<Identity>>) -> Self {
        self.user = user;
        self
    }

    /// Times the polls from here on with `clock`; at first with that of the CPU.
    pub fn time_by(&mut self, clock: Clock) {
        self.clock = clock;
    }
}

impl<T> Future for Driven<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let this = &mut *self;
        if this.cpu.is_limited() {
            ready!(this.turn.poll(&this.cpu, cx));
        }
        let clock = if this.cpu.wants_exactness() { Clock::Cpu } else { this.clock };
        let _left = this.running.enter();
        let _user = this.user.as_deref().and_then(Identity::enter);
        match clock {
            Clock::Cpu => {
                let before = thread_cpu_time();
                let poll = this.future.as_mut().poll(cx);
                this.cpu.add(thread_cpu_time().saturating_sub(before));
                poll
            }
            Clock::Wall => {
                let before = Instant::now();
                let poll = this.future.as_mut().poll(cx);
                this.cpu.add_wall(before.elapsed());
                poll
            }
        }
    }
}

fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}
