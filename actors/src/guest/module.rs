//! From bytes to a program: the loaded programs of the process.
//!
//! ```text
//!   load ─▶ inspect, hash ─▶ table ─┬─ alive: share it
//!           (job.rs)                ├─ on its way: wait for it
//!                                   └─ else one task: code (workshop.rs) ─▶ link ─▶ everyone who waits
//! ```
//! Invariants. A key is loaded by at most one task at a time, which outlives the callers who gave up. The table holds
//! programs weakly: the last container that drops one unmaps it, if its start was long enough ago: what runs shortly and
//! often is not checked and mapped anew each time. Nothing here computes on the caller's thread: hashing, files, mapping
//! and linking go to blocking threads.
//!
//! Called by whoever creates a container.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio_util::task::TaskTracker;

use super::LoadError;
use super::cache::Key;
use super::code::Code;
use super::compile::CompileSettings;
use super::engine::{Bounds, Engines, Kind};
use super::job::Job;
use super::workshop::{Workshop, loading, stopping};
use crate::image::Content;

/// The loaded programs. `T` is what the caller makes of the code, once for all containers that run it.
pub struct Programs<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    shop: Arc<Workshop>,
    link: Link<T>,
    table: Mutex<HashMap<Key, Slot<T>>>,
    /// What keeps programs loaded, by their addresses: one task each, however often they are started.
    lingering: Mutex<HashMap<usize, AbortHandle>>,
    tasks: TaskTracker,
}

enum Slot<T> {
    Loaded(Weak<T>),
    Loading(Answer<T>),
}

type Link<T> = fn(&Engines, Kind, Code) -> Result<T, LoadError>;
type Loaded<T> = Result<Arc<T>, LoadError>;
/// Empty until the task that loads has an answer; closed without one if the runtime ended it.
type Answer<T> = watch::Receiver<Option<Loaded<T>>>;

impl<T: Send + Sync + 'static> Programs<T> {
    /// `link` is called on a blocking thread.
    pub fn new(engines: Engines, settings: CompileSettings, link: Link<T>) -> Self {
        let shop = Arc::new(Workshop::new(engines, settings));
        let (table, lingering, tasks) = (Mutex::default(), Mutex::default(), TaskTracker::new());
        Self { shared: Arc::new(Shared { shop, link, table, lingering, tasks }) }
    }

    /// The program with these bytes. `name` is what messages call it: its path in the image.
    /// `bounds` matters to servers only.
    pub async fn load(&self, name: &str, wasm: Vec<u8>, bounds: Bounds) -> Result<Arc<T>, LoadError> {
        let job = self.shared.shop.job(name, wasm, bounds).await;
        self.finish(name, job).await
    }

    /// The program of a layer, which is read only if its code is neither loaded nor in the cache.
    pub async fn load_layer(&self, name: &str, content: Arc<dyn Content>, bounds: Bounds) -> Result<Arc<T>, LoadError> {
        let job = self.shared.shop.job_of_layer(name, content, bounds).await;
        self.finish(name, job).await
    }

    async fn finish(&self, name: &str, job: Result<Job, LoadError>) -> Result<Arc<T>, LoadError> {
        let finish = async {
            match self.shared.claim(job?) {
                Claim::Ready(program) => Ok(program),
                Claim::Wait(mut answer) => {
                    let answer = answer.wait_for(Option::is_some).await;
                    answer.ok().and_then(|answer| answer.clone()).unwrap_or_else(|| Err(stopping()))
                }
            }
        };
        let program = finish.await.map_err(|error| error.about(name))?;
        self.shared.linger(Arc::clone(&program));
        Ok(program)
    }

    /// Ends the compiles that run and waits for everything that loads; whoever still waits gets an error.
    pub async fn close(&self) {
        self.shared.shop.close();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

impl<T> Drop for Programs<T> {
    fn drop(&mut self) {
        self.shared.shop.close();
    }
}

enum Claim<T> {
    Ready(Arc<T>),
    Wait(Answer<T>),
}

impl<T: Send + Sync + 'static> Shared<T> {
    /// The program if it lives, the way to hear of it if it is on its way, else its loading is started now.
    fn claim(self: &Arc<Self>, job: Job) -> Claim<T> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.retain(|_, slot| match slot {
            Slot::Loaded(program) => program.strong_count() > 0,
            // A task that was dropped with its runtime never answers.
            Slot::Loading(answer) => answer.has_changed().is_ok(),
        });
        match table.get(&job.key) {
            Some(Slot::Loaded(program)) => {
                if let Some(program) = program.upgrade() {
                    return Claim::Ready(program);
                }
            }
            Some(Slot::Loading(answer)) => return Claim::Wait(answer.clone()),
            None => {}
        }
        let (sender, answer) = watch::channel(None);
        table.insert(job.key, Slot::Loading(answer.clone()));
        self.tasks.spawn(self.clone().work(job, sender));
        Claim::Wait(answer)
    }

    /// Keeps it loaded for whoever starts the same soon.
    fn linger(&self, program: Arc<T>) {
        let linger = self.shop.settings().linger;
        if linger.is_zero() {
            return;
        }
        let (ending, address) = (self.shop.ending(), Arc::as_ptr(&program) as *const () as usize);
        let task = self.tasks.spawn(async move {
            // Whichever comes first, it is let go.
            let _ = tokio::time::timeout(linger, ending.cancelled_owned()).await;
            drop(program);
        });
        let mut lingering = self.lingering.lock().unwrap_or_else(PoisonError::into_inner);
        lingering.retain(|_, task| !task.is_finished());
        // The later start counts.
        if let Some(earlier) = lingering.insert(address, task.abort_handle()) {
            earlier.abort();
        }
    }

    /// The one task for a key.
    async fn work(self: Arc<Self>, job: Job, sender: watch::Sender<Option<Loaded<T>>>) {
        let key = job.key;
        let loaded = self.make(Arc::new(job)).await;
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        match &loaded {
            Ok(program) => table.insert(key, Slot::Loaded(Arc::downgrade(program))),
            // Not remembered: a full disk or a closed folder may be repaired by the next attempt.
            Err(_) => table.remove(&key),
        };
        drop(table);
        sender.send_replace(Some(loaded));
    }

    async fn make(&self, job: Arc<Job>) -> Loaded<T> {
        let made = self.shop.make(&job).await?;
        let (shop, link) = (self.shop.clone(), self.link);
        loading(move || link(&shop.engines, job.kind, made.code).map(Arc::new)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn many_starts_of_one_program_keep_it_loaded_once() {
        let mut settings = CompileSettings::new("/proc/nonexistent/cache");
        settings.linger = std::time::Duration::from_secs(24 * 3600);
        let programs = Programs::new(Engines::new(), settings, |_, _, _| Ok(()));
        let (one, other) = (Arc::new(()), Arc::new(()));
        for _ in 0..100 {
            programs.shared.linger(Arc::clone(&one));
            programs.shared.linger(Arc::clone(&other));
            tokio::task::yield_now().await;
        }
        tokio::task::yield_now().await;
        assert_eq!(programs.shared.tasks.len(), 2);
        assert_eq!((Arc::strong_count(&one), Arc::strong_count(&other)), (2, 2));
        programs.close().await;
        assert_eq!(Arc::strong_count(&one), 1);
    }

    #[tokio::test]
    async fn what_is_refused_at_first_sight_starts_no_worker() {
        let mut settings = CompileSettings::new("/proc/nonexistent/cache");
        settings.worker = "/nonexistent/worker".into();
        let programs = Programs::new(Engines::new(), settings, |_, _, _| Ok(()));
        let error = programs.load("/bin/ls", b"\x7fELF\x02\x01\x01\0".to_vec(), Bounds::default()).await.unwrap_err();
        assert!(matches!(error, LoadError::NotWasm { .. }));
        let error = programs.load("/app.wasm", b"\0asm\x01\0\0\0".to_vec(), Bounds::default()).await.unwrap_err();
        assert!(error.to_string().contains("worker cannot be started"), "{error}");
        programs.close().await;
    }
}
