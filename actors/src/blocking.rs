//! Threads for what blocks and must be done whatever happens: mounts, files, programs that are waited for.
//!
//! ```text
//!   blocking(job) ─▶ a queue ─▶ a thread that waits ─ or else a new one ─ or else the first that is done
//! ```
//! tokio's own (`spawn_blocking`) all end when there is nothing to do, and where the system then grants no new one
//! (`pids.max`, `TasksMax`), it panics: a container could be neither made nor removed. Here one thread stays for good.
//! Guests' file operations and what runs for them are tokio's all the same: it knows whose they are (`users`).

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// More threads than this are not of use: each may be stuck in a mount of a server that is gone.
const MOST: usize = 512;
/// A thread that has nothing to do for so long ends, unless it is the last.
const IDLE: Duration = Duration::from_secs(10);

static POOL: LazyLock<Arc<Pool>> = LazyLock::new(|| Arc::new(Pool::new(MOST, IDLE)));

/// A job panicked, or there is not one thread.
#[derive(Debug, thiserror::Error)]
#[error("a panic, or no thread; the log has more")]
pub struct NotDone;

/// Starts the thread that stays. Called when the process begins: later there may be none to be had.
///
/// # Errors
/// When the system has no thread left.
pub fn keep_a_thread() -> io::Result<()> {
    let mut state = POOL.lock();
    if state.threads == 0 { POOL.grow(&mut state) } else { Ok(()) }
}

/// Does a job on a thread that may block, in the runtime of the caller. It is done to its end, even if nobody waits for it.
///
/// # Errors
/// When it panics, and where nobody [kept a thread](keep_a_thread) and there is none.
pub async fn blocking<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> Result<T, NotDone> {
    POOL.run(job).await
}

type Job = Box<dyn FnOnce() + Send>;

struct Pool {
    state: Mutex<State>,
    work: Condvar,
    most: usize,
    idle: Duration,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    /// Of them, those that wait; as many jobs of the queue are theirs already.
    waiting: usize,
    /// The last new thread was refused.
    is_short: bool,
}

impl Pool {
    fn new(most: usize, idle: Duration) -> Self {
        Self { state: Mutex::default(), work: Condvar::new(), most, idle }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run<T: Send + 'static>(self: &Arc<Self>, job: impl FnOnce() -> T + Send + 'static) -> Result<T, NotDone> {
        let (done, result) = oneshot::channel();
        let runtime = Handle::try_current().ok();
        self.add(Box::new(move || {
            let _inside = runtime.as_ref().map(Handle::enter);
            // The panic is in the log, and the caller sees that nothing was sent.
            drop(catch_unwind(AssertUnwindSafe(move || done.send(job()).is_ok())));
        }));
        result.await.map_err(|_| NotDone)
    }

    fn add(self: &Arc<Self>, job: Job) {
        let mut state = self.lock();
        state.queue.push_back(job);
        if state.waiting >= state.queue.len() {
            self.work.notify_one();
        } else if state.threads < self.most {
            let was_short = state.is_short;
            let refused = self.grow(&mut state).err();
            state.is_short = refused.is_some();
            // One line when it begins: it may go on for long.
            if let (Some(error), false) = (refused, was_short) {
                tracing::warn!(%error, threads = state.threads, "the system grants no thread: what blocks waits for others");
            }
            if state.threads == 0 {
                let lost = std::mem::take(&mut state.queue);
                drop(state);
                drop(lost);
            }
        }
    }

    fn grow(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        let pool = Arc::clone(self);
        std::thread::Builder::new().name("blocking".into()).spawn(move || pool.work())?;
        state.threads += 1;
        Ok(())
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                job();
                state = self.lock();
                continue;
            }
            state.waiting += 1;
            let timed_out;
            (state, timed_out) = if state.threads == 1 {
                (self.work.wait(state).unwrap_or_else(PoisonError::into_inner), false)
            } else {
                let (state, waited) = self.work.wait_timeout(state, self.idle).unwrap_or_else(PoisonError::into_inner);
                (state, waited.timed_out())
            };
            state.waiting -= 1;
            if timed_out && state.queue.is_empty() && state.threads > 1 {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::mpsc;
    use std::task::Poll;

    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    fn threads(pool: &Pool) -> usize {
        pool.lock().threads
    }

    #[tokio::test]
    async fn jobs_that_wait_for_each_other_run_side_by_side_and_one_thread_stays() {
        let pool = Arc::new(Pool::new(MOST, SHORT));
        let meeting = Arc::new(Barrier::new(4));
        let jobs: Vec<_> = (0..4)
            .map(|number| {
                let meeting = Arc::clone(&meeting);
                let job = move || {
                    meeting.wait();
                    number
                };
                let pool = Arc::clone(&pool);
                tokio::spawn(async move { pool.run(job).await })
            })
            .collect();
        for (number, job) in jobs.into_iter().enumerate() {
            assert_eq!(job.await.unwrap().unwrap(), number);
        }
        while threads(&pool) > 1 {
            tokio::time::sleep(SHORT).await;
        }
        tokio::time::sleep(3 * SHORT).await;
        assert_eq!(threads(&pool), 1);
        assert_eq!(pool.run(|| 7).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn without_another_thread_a_job_waits_for_the_one_there_is() {
        let pool = Arc::new(Pool::new(1, SHORT));
        let (go, wait) = mpsc::channel();
        let slow = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move { pool.run(move || wait.recv().unwrap()).await }
        });
        tokio::task::yield_now().await;
        let next = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move { pool.run(|| 2).await }
        });
        tokio::task::yield_now().await;
        go.send(1).unwrap();
        assert_eq!((slow.await.unwrap().unwrap(), next.await.unwrap().unwrap()), (1, 2));
        assert_eq!(threads(&pool), 1);
    }

    #[tokio::test]
    async fn a_panic_is_its_callers_alone_and_jobs_have_the_callers_runtime() {
        let pool = Arc::new(Pool::new(1, SHORT));
        assert!(pool.run(|| panic!("on purpose")).await.is_err());
        pool.run(|| drop(tokio::spawn(async {}))).await.unwrap();
        assert_eq!(threads(&pool), 1);
    }

    #[tokio::test]
    async fn a_job_is_done_though_nobody_waits() {
        let pool = Arc::new(Pool::new(1, SHORT));
        let (done, seen) = oneshot::channel();
        let mut run = Box::pin(pool.run(move || done.send(()).unwrap()));
        std::future::poll_fn(|cx| {
            assert!(run.as_mut().poll(cx).is_pending());
            Poll::Ready(())
        })
        .await;
        drop(run);
        seen.await.unwrap();
    }
}
