//! The threads that serve connections: one a core, each with a runtime of its own.
//!
//! ```text
//! worker 0  worker 1 …      connections, and the requests that end within a turn (a tick of the epoch)
//!      ╲      ╱ too long
//!     background            the requests that compute, as many threads as cores
//! ```
//! A connection stays on its worker: nothing is handed from core to core on the way of a request (measured: a twentieth of
//! its cost). A guest that uses up its turn is moved to the background, where the kernel gives it what the workers leave or
//! half of each core, whichever is more: a container that computes slows its neighbours down by half at most.
//!
//! Made by the first server of the process; idle threads cost nothing but their stacks.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;

use crate::sharded::number_this_thread;

/// The threads of all servers.
#[derive(Debug)]
pub struct Workers {
    workers: Vec<Worker>,
    background: Option<Runtime>,
}

#[derive(Debug)]
struct Worker {
    handle: Handle,
    connections: Arc<AtomicUsize>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// A connection's place on a worker.
#[derive(Debug)]
pub struct Place {
    pub runtime: Handle,
    connections: Arc<AtomicUsize>,
}

impl Workers {
    /// Starts them.
    ///
    /// # Errors
    /// When the system has no threads or descriptors left.
    pub fn start() -> std::io::Result<Self> {
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = (0..count).map(Worker::start).collect::<std::io::Result<_>>()?;
        let background =
            Builder::new_multi_thread().thread_name("background").worker_threads(count).enable_all().build()?;
        Ok(Self { workers, background: Some(background) })
    }

    /// The worker with the fewest connections.
    pub fn place(&self) -> Option<Place> {
        let worker = self.workers.iter().min_by_key(|worker| worker.connections.load(Ordering::Relaxed))?;
        worker.connections.fetch_add(1, Ordering::Relaxed);
        Some(Place { runtime: worker.handle.clone(), connections: Arc::clone(&worker.connections) })
    }

    /// Where guests go that compute.
    pub fn background(&self) -> Option<&Handle> {
        self.background.as_ref().map(Runtime::handle)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        if let Some(background) = self.background.take() {
            background.shutdown_background();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Worker {
    fn start(number: usize) -> std::io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name(format!("http-{number}")).spawn(move || {
            number_this_thread(number);
            // An error means that the owner is gone, which is what is waited for.
            drop(runtime.block_on(stopped));
            runtime.shutdown_background();
        })?;
        Ok(Self { handle, connections: Arc::default(), stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a worker thread panicked");
        }
    }
}
