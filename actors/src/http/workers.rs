//! The threads that serve requests: as many as cores, each way.
//!
//! ```text
//! http             connections to guests of WASI 0.2, and the requests that end within a turn (a tick of the epoch)
//! http-0 http-1 …  connections to guests of WASI 0.3, each on the same thread all its life
//!    │ too long
//!    ▼
//! background       the requests that compute
//! ```
//! Threads steal: whoever has nothing to do takes what waits for another one. A connection that stayed on one thread would
//! find its memory in that core's caches, which is a tenth of the smallest requests; but a kernel, or a hypervisor below it,
//! lets a thread wait for milliseconds now and then, and all its connections would wait with it while another core rests
//! (measured: at half of the load the slowest hundredth took five to twenty times as long).
//!
//! Requests of WASI 0.3 share instances, which take them from one thread only: that thread's connections do not move.
//!
//! A guest that uses up its turn is moved to the background, where the kernel gives it what the others leave or half of each
//! core, whichever is more: a container that computes slows its neighbours down by half at most.
//!
//! Made by the first server of the process, `http-0` and so on by the first one of WASI 0.3; idle threads cost nothing but
//! their stacks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;

use crate::sharded::{cores, number_this_thread};

/// The threads of all servers.
#[derive(Debug)]
pub struct Workers {
    stealing: Stealing,
    lone: Mutex<Vec<Lone>>,
    background: Stealing,
}

/// Threads that steal from each other. May be dropped anywhere: they end by themselves.
#[derive(Debug)]
struct Stealing {
    handle: Handle,
    runtime: Option<Runtime>,
}

/// A thread whose connections stay.
#[derive(Debug)]
struct Lone {
    handle: Handle,
    connections: Arc<AtomicUsize>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// A connection's place among the threads.
#[derive(Debug)]
pub struct Place {
    pub runtime: Handle,
    connections: Option<Arc<AtomicUsize>>,
}

impl Workers {
    /// Starts them.
    ///
    /// # Errors
    /// When the system has no threads or descriptors left.
    pub fn start() -> std::io::Result<Self> {
        grants(2 * cores())?;
        let (stealing, background) = (Stealing::start("http")?, Stealing::start("background")?);
        Ok(Self { stealing, lone: Mutex::default(), background })
    }

    /// Where servers are polled, and connections that may move.
    pub fn any(&self) -> Place {
        Place { runtime: self.stealing.handle.clone(), connections: None }
    }

    /// Starts the threads of [`one`](Self::one), unless they run.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_lone(&self) -> std::io::Result<()> {
        let mut lone = self.lone.lock().unwrap_or_else(PoisonError::into_inner);
        if lone.is_empty() {
            *lone = (0..cores()).map(Lone::start).collect::<Result<_, _>>()?;
        }
        Ok(())
    }

    /// The thread with the fewest connections, for one that stays there; any place, where no such threads were started.
    pub fn one(&self) -> Place {
        let lone = self.lone.lock().unwrap_or_else(PoisonError::into_inner);
        let fewest = lone.iter().min_by_key(|thread| thread.connections.load(Ordering::Relaxed));
        let Some(thread) = fewest else { return self.any() };
        thread.connections.fetch_add(1, Ordering::Relaxed);
        Place { runtime: thread.handle.clone(), connections: Some(Arc::clone(&thread.connections)) }
    }

    /// Where guests go that compute.
    pub fn background(&self) -> &Handle {
        &self.background.handle
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(connections) = &self.connections {
            connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Stealing {
    fn start(name: &str) -> std::io::Result<Self> {
        let next = AtomicUsize::new(0);
        let mut threads = Builder::new_multi_thread();
        threads
            .thread_name(name)
            .worker_threads(cores())
            // Side by side they count in different pieces of what is sharded.
            .on_thread_start(move || number_this_thread(next.fetch_add(1, Ordering::Relaxed)))
            .enable_all();
        // Somebody else may have taken what was granted a moment ago: then it panics.
        let made = catch_unwind(AssertUnwindSafe(|| threads.build()));
        let runtime = made.unwrap_or_else(|_| Err(std::io::Error::other("a panic; the log has more")))?;
        Ok(Self { handle: runtime.handle().clone(), runtime: Some(runtime) })
    }
}

impl Drop for Stealing {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Whether the system has so many threads for us. A runtime would panic for want of its first, and do without the others.
fn grants(threads: usize) -> std::io::Result<()> {
    let one = || {
        let (end, ended) = mpsc::channel::<()>();
        // An error means that the other end is gone, which is what is waited for.
        let thread = std::thread::Builder::new().spawn(move || ended.recv().is_ok())?;
        Ok((end, thread))
    };
    let threads: Vec<_> = (0..threads).map(|_| one()).collect::<std::io::Result<_>>()?;
    for (end, thread) in threads {
        drop(end);
        drop(thread.join());
    }
    Ok(())
}

impl Lone {
    fn start(number: usize) -> std::io::Result<Self> {
        let (made, runtime) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        // Its runtime is made there: where the system grants no thread, none may be dropped here, among actors.
        let thread = std::thread::Builder::new().name(format!("http-{number}")).spawn(move || {
            let runtime = match Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(made.send(Err(error))),
            };
            drop(made.send(Ok(runtime.handle().clone())));
            number_this_thread(number);
            // An error means that the owner is gone, which is what is waited for.
            drop(runtime.block_on(stopped));
            runtime.shutdown_background();
        })?;
        let handle = runtime.recv().map_err(std::io::Error::other)??;
        Ok(Self { handle, connections: Arc::default(), stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Lone {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a worker thread panicked");
        }
    }
}
