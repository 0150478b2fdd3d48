//! The CPU time of a container: what its guests have used, and what they may use.
//!
//! ```text
//!   guest is to be polled ─▶ bucket: left? ─ yes ─▶ polled, charged afterwards
//!                              └─ no ─▶ waits, off its thread, for the window in which there is some again
//! ```
//! As the kernel does it (`cpu.max`): with each period comes a quota, shared by all guests of the container, and what is
//! not used is lost. A guest runs for a tick or two at a time and is charged when it has: what it took too much of is owed
//! by the next window. So the sum over a second is right, whatever the period.
//!
//! Invariants. A container without a quota pays two loads of atomics for each poll. Nobody waits inside of a store, so
//! deadlines and signals, which lie around it, are as quick as ever.
//!
//! Called by `epoch.rs`, which polls the guests, and by the container, whose limits may change.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use tokio::time::Sleep;

use crate::resources::Quota;
use crate::sharded::Counter;

/// What a quota has done so far, in the words of the kernel's `cpu.stat`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Throttled {
    /// Periods in which guests ran.
    pub periods: u64,
    /// Those in which they had to wait.
    pub throttled: u64,
    /// How long they waited; several at once count once.
    pub time: Duration,
}

/// CPU time used by one container's guests.
#[derive(Debug, Default)]
pub struct CpuTime {
    total: Counter,
    is_limited: AtomicBool,
    /// Polls to be timed exactly, as the machine was busy a moment ago.
    exact: AtomicU32,
    bucket: Mutex<Bucket>,
}

/// No turn is longer: it was interrupted by others.
const LONGEST: Duration = Duration::from_millis(2);
/// For so many polls after such a one, the wall's clock is not to be believed.
const WARY: u32 = 1000;

impl CpuTime {
    /// None used, and so much to use.
    pub fn new(quota: Option<Quota>) -> Self {
        let cpu = Self::default();
        cpu.limit(quota);
        cpu
    }

    /// So far. A guest that is running is counted up to its last yield, a tick ago at most.
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.total.total())
    }

    /// How often and how long guests had to wait.
    pub fn throttled(&self) -> Throttled {
        self.bucket().throttled(Instant::now())
    }

    /// The quota, if there is one.
    pub fn quota(&self) -> Option<Quota> {
        self.bucket().quota
    }

    /// From now on guests may use so much; those that wait look again.
    pub fn limit(&self, quota: Option<Quota>) {
        let waiting = {
            let mut bucket = self.bucket();
            bucket.limit(quota, Instant::now());
            self.is_limited.store(quota.is_some(), Ordering::Release);
            std::mem::take(&mut bucket.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Whether there is a quota.
    pub(super) fn is_limited(&self) -> bool {
        self.is_limited.load(Ordering::Acquire)
    }

    /// Whether the next poll has to be timed by the CPU's clock: for a quota, or because others' time would be counted.
    pub(super) fn wants_exactness(&self) -> bool {
        let exact = self.exact.load(Ordering::Relaxed);
        if exact > 0 {
            self.exact.store(exact - 1, Ordering::Relaxed);
        }
        exact > 0 || self.is_limited()
    }

    /// A guest has run for so long, or others on its core.
    pub(super) fn add_wall(&self, time: Duration) {
        if time > LONGEST {
            self.exact.store(WARY, Ordering::Relaxed);
        }
        self.add(time.min(LONGEST));
    }

    /// A guest has run for so long.
    pub(super) fn add(&self, time: Duration) {
        self.total.add(nanos(time).unsigned_abs());
        if self.is_limited() {
            self.bucket().charge(time, Instant::now());
        }
    }

    fn bucket(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One guest's place before the bucket.
#[derive(Debug, Default)]
pub(super) struct Turn(Option<Pin<Box<Sleep>>>);

impl Turn {
    /// Ready when the guest may be polled.
    pub fn poll(&mut self, cpu: &CpuTime, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(at) = cpu.is_limited().then(|| cpu.bucket().wait(Instant::now(), cx.waker())).flatten() {
            let at = tokio::time::Instant::from_std(at);
            let sleep = self.0.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
            if sleep.deadline() != at {
                sleep.as_mut().reset(at);
            }
            ready!(sleep.as_mut().poll(cx));
        }
        self.0 = None;
        Poll::Ready(())
    }
}

/// The account. Has no clock of its own.
#[derive(Debug, Default)]
struct Bucket {
    quota: Option<Quota>,
    /// When the current window began; none before anything was used.
    window: Option<Instant>,
    /// Nanoseconds; below zero, what is owed.
    left: i64,
    /// In this window guests have run, or waited.
    ran: bool,
    waited: bool,
    /// Since when nobody may run although somebody would.
    closed: Option<Instant>,
    seen: Throttled,
    waiting: Vec<Waker>,
}

impl Bucket {
    fn limit(&mut self, quota: Option<Quota>, now: Instant) {
        self.advance(now);
        self.open(now);
        self.quota = quota;
        // A new quota begins with a window of its own, and nobody owes anything.
        (self.window, self.ran, self.waited) = (None, false, false);
        self.left = quota.map_or(0, |quota| nanos(quota.time));
    }

    /// To the window in which the guest was let run: what is left of that is lost anyway.
    fn charge(&mut self, time: Duration, now: Instant) {
        if !std::mem::replace(&mut self.ran, true) {
            self.seen.periods += 1;
        }
        self.left = self.left.saturating_sub(nanos(time));
        self.advance(now);
    }

    /// When to look again; `None`: now is the time.
    fn wait(&mut self, now: Instant, waker: &Waker) -> Option<Instant> {
        let quota = self.quota?;
        self.advance(now);
        if self.left > 0 {
            return None;
        }
        if !std::mem::replace(&mut self.waited, true) {
            self.seen.throttled += 1;
        }
        self.closed.get_or_insert(now);
        if !self.waiting.iter().any(|known| known.will_wake(waker)) {
            self.waiting.push(waker.clone());
        }
        Some(self.window.unwrap_or(now) + quota.period.saturating_mul(self.owed_windows(quota)))
    }

    /// How many windows it takes until something is left again.
    fn owed_windows(&self, quota: Quota) -> u32 {
        let windows = 1 + self.left.min(0).unsigned_abs() / nanos(quota.time).unsigned_abs();
        u32::try_from(windows).unwrap_or(u32::MAX)
    }

    fn throttled(&mut self, now: Instant) -> Throttled {
        self.advance(now);
        let open = self.closed.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        Throttled { time: self.seen.time + open, ..self.seen }
    }

    /// Goes on to the window of `now`.
    fn advance(&mut self, now: Instant) {
        let Some(quota) = self.quota else { return };
        let begun = *self.window.get_or_insert(now);
        let gone = now.saturating_duration_since(begun).as_nanos() / quota.period.as_nanos();
        let gone = u32::try_from(gone).unwrap_or(u32::MAX);
        if gone == 0 {
            return;
        }
        if self.closed.is_some() {
            let owed = self.owed_windows(quota);
            // Whole windows that passed while everybody waited.
            let passed = u64::from(gone.min(owed)) - 1;
            self.seen.periods += passed;
            self.seen.throttled += passed;
            if gone >= owed {
                self.open(begun + quota.period.saturating_mul(owed));
                // Their own timers wake them.
                self.waiting.clear();
            }
        }
        let full = nanos(quota.time);
        self.window = Some(begun + quota.period.saturating_mul(gone));
        self.left = self.left.saturating_add(full.saturating_mul(gone.into())).min(full);
        (self.ran, self.waited) = (false, false);
    }

    fn open(&mut self, at: Instant) {
        if let Some(since) = self.closed.take() {
            self.seen.time += at.saturating_duration_since(since);
        }
    }
}

fn nanos(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn quota(time: u32, period: u32) -> Option<Quota> {
        Some(Quota { time: MS * time, period: MS * period })
    }

    /// A guest that wants all the time there is, in turns of `turn`; what it got within `total`.
    fn greedy(bucket: &mut Bucket, start: Instant, total: Duration, turn: Duration) -> Duration {
        let (mut now, mut got) = (start, Duration::ZERO);
        while now < start + total {
            match bucket.wait(now, Waker::noop()) {
                Some(at) => {
                    assert!(at > now, "a wait without an end");
                    now = at;
                }
                None => {
                    now += turn;
                    got += turn;
                    bucket.charge(turn, now);
                }
            }
        }
        got
    }

    #[test]
    fn a_greedy_guest_gets_its_quota_and_no_more() {
        for (time, period) in [(20, 100), (50, 100), (1, 100), (10, 10), (2, 10), (1, 1), (500, 1000)] {
            let (mut bucket, start) = (Bucket::default(), Instant::now());
            bucket.limit(quota(time, period), start);
            let got = greedy(&mut bucket, start, MS * 10_000, Duration::from_micros(1300));
            let ratio = got.as_secs_f64() / (10.0 * f64::from(time) / f64::from(period));
            assert!((0.98..1.02).contains(&ratio), "{time}/{period}: {ratio}");
        }
    }

    #[test]
    fn what_is_not_used_is_lost_and_what_is_taken_too_much_is_owed() {
        let (mut bucket, start) = (Bucket::default(), Instant::now());
        bucket.limit(quota(10, 100), start);
        assert_eq!(bucket.wait(start, Waker::noop()), None);
        // Idle for a minute: one window's worth is there.
        let later = start + MS * 60_000;
        assert_eq!(bucket.wait(later, Waker::noop()), None);
        bucket.charge(MS * 35, later + MS * 35);
        assert_eq!(bucket.wait(later + MS * 35, Waker::noop()), Some(later + MS * 300));
        let seen = bucket.throttled(later + MS * 300);
        assert_eq!(seen, Throttled { periods: 3, throttled: 3, time: MS * 265 });
        assert_eq!(bucket.wait(later + MS * 300, Waker::noop()), None);
    }

    #[test]
    fn the_time_of_waiting_is_told_while_it_lasts() {
        let (mut bucket, start) = (Bucket::default(), Instant::now());
        bucket.limit(quota(10, 100), start);
        assert!(bucket.wait(start, Waker::noop()).is_none());
        bucket.charge(MS * 10, start + MS * 10);
        assert!(bucket.wait(start + MS * 20, Waker::noop()).is_some());
        assert!(bucket.wait(start + MS * 30, Waker::noop()).is_some());
        assert_eq!(bucket.throttled(start + MS * 50).time, MS * 30);
        assert_eq!(bucket.throttled(start + MS * 500), Throttled { periods: 1, throttled: 1, time: MS * 80 });
    }

    #[test]
    fn a_change_counts_at_once() {
        let cpu = CpuTime::new(quota(1, 1000));
        cpu.add(MS * 500);
        assert!(cpu.bucket().wait(Instant::now(), Waker::noop()).is_some());
        cpu.limit(quota(2, 1000));
        assert_eq!(cpu.bucket().wait(Instant::now(), Waker::noop()), None);
        cpu.add(MS * 500);
        cpu.limit(None);
        assert!(!cpu.is_limited() && cpu.bucket().wait(Instant::now(), Waker::noop()).is_none());
        assert_eq!((cpu.total(), cpu.throttled().throttled), (MS * 1000, 1));
    }

    #[test]
    fn a_busy_machine_is_noticed() {
        let cpu = CpuTime::default();
        cpu.add_wall(MS);
        assert!(!cpu.wants_exactness());
        cpu.add_wall(MS * 50);
        assert_eq!(cpu.total(), MS * 3);
        assert!((0..WARY).all(|_| cpu.wants_exactness()) && !cpu.wants_exactness());
    }

    #[tokio::test]
    async fn guests_that_wait_are_woken_by_a_change() {
        let cpu = std::sync::Arc::new(CpuTime::new(quota(1, 1000)));
        // Weeks.
        cpu.add(MS * 3_600_000);
        let theirs = std::sync::Arc::clone(&cpu);
        let waiting = tokio::spawn(async move {
            let mut turn = Turn::default();
            std::future::poll_fn(|cx| turn.poll(&theirs, cx)).await;
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        cpu.limit(None);
        waiting.await.unwrap();
    }

    proptest! {
        #[test]
        fn no_order_of_calls_makes_it_panic(calls in prop::collection::vec((0..4_u8, 0..u64::MAX / 4), 0..100)) {
            let (mut bucket, start, mut now) = (Bucket::default(), Instant::now(), 0);
            for (call, amount) in calls {
                let time = Duration::from_nanos(amount);
                now = (now + amount % 10_000_000_000).min(1 << 60);
                let at = start + Duration::from_nanos(now);
                match call {
                    0 => bucket.limit(Some(Quota { time: time.max(MS), period: MS * (1 + amount as u32 % 1000) }), at),
                    1 => bucket.charge(time, at),
                    2 => drop(bucket.throttled(at)),
                    _ => prop_assert!(bucket.wait(at, Waker::noop()).is_none_or(|then| then > at)),
                }
            }
        }
    }
}
