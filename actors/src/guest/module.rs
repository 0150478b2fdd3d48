//! From bytes to a program: the loaded programs of the process.
//!
//! ```text
//!   load ─▶ inspect, hash ─▶ table ─┬─ alive: share it
//!           (blocking)              ├─ on its way: wait for it
//!                                   └─ else one task: cache ─▶ map ─▶ link ─▶ everyone who waits
//!                                                       └─ miss: permit ─▶ worker ─▶ cache ─▶ …
//! ```
//! Invariants. A key is loaded by at most one task at a time, which outlives the callers who gave up. The table holds
//! programs weakly: the last container that drops one unmaps it. Nothing here computes on the caller's thread; hashing,
//! files and mapping go to blocking threads, and as many of them compile as there are permits.
//!
//! Called by whoever creates a container.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, watch};
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};
use wasmtime::component::Component;
use wasmtime::{Engine, Module};

use super::LoadError;
use super::cache::{Cache, Key};
use super::compile::{Compiler, sealed};
use super::engine::{Bounds, Engines, Kind};
use super::inspect::{Format, inspect};
use super::nature::Nature;
use super::text::to_binary;

pub use super::compile::CompileSettings;

/// Mapped, executable code that is not linked yet.
pub enum Code {
    /// A core module.
    Module(Module),
    /// A component.
    Component(Component),
}

/// The loaded programs. `T` is what the caller makes of the code, once for all containers that run it.
pub struct Programs<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    engines: Engines,
    compiler: Compiler,
    permits: Semaphore,
    link: Link<T>,
    table: Mutex<HashMap<Key, Slot<T>>>,
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

/// One program on its way.
struct Job {
    /// The name the first one who asked has for it; for the log only.
    name: String,
    key: Key,
    kind: Kind,
    format: Format,
    wasm: Vec<u8>,
}

impl<T: Send + Sync + 'static> Programs<T> {
    /// `link` is called on a blocking thread.
    pub fn new(engines: Engines, settings: CompileSettings, link: Link<T>) -> Self {
        let permits = Semaphore::new(settings.parallel.max(1));
        let compiler = Compiler::new(settings);
        let (table, tasks) = (Mutex::default(), TaskTracker::new());
        Self { shared: Arc::new(Shared { engines, compiler, permits, link, table, tasks }) }
    }

    /// The program with these bytes. `name` is what messages call it: its path in the image.
    /// `bounds` matters to servers only.
    pub async fn load(&self, name: &str, wasm: Vec<u8>, bounds: Bounds) -> Result<Arc<T>, LoadError> {
        let load = async {
            let job = self.shared.prepare(name, wasm, bounds).await?;
            match self.shared.claim(job) {
                Claim::Ready(program) => Ok(program),
                Claim::Wait(mut answer) => {
                    let answer = answer.wait_for(Option::is_some).await;
                    answer.ok().and_then(|answer| answer.clone()).unwrap_or_else(|| Err(stopping()))
                }
            }
        };
        load.await.map_err(|error| error.about(name))
    }

    /// Ends the compiles that run and waits for everything that loads; whoever still waits gets an error.
    pub async fn close(&self) {
        self.shared.compiler.close();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

impl<T> Drop for Programs<T> {
    fn drop(&mut self) {
        self.shared.compiler.close();
    }
}

enum Claim<T> {
    Ready(Arc<T>),
    Wait(Answer<T>),
}

impl<T: Send + Sync + 'static> Shared<T> {
    async fn prepare(self: &Arc<Self>, name: &str, wasm: Vec<u8>, bounds: Bounds) -> Result<Job, LoadError> {
        let (shared, name) = (self.clone(), name.to_owned());
        blocking(move || {
            let wasm = to_binary(&shared.compiler, wasm)?;
            let format = inspect(&wasm, shared.compiler.settings.max_module_size)?;
            let kind = match format {
                Format::Module => Kind::Command,
                Format::Component => Nature::of(&wasm).kind(bounds),
            };
            let key = key(&wasm, kind, &shared.engines.fingerprint(kind)?);
            Ok(Job { name, key, kind, format, wasm })
        })
        .await
    }

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

    async fn make(self: &Arc<Self>, job: Arc<Job>) -> Loaded<T> {
        let (shared, cached) = (self.clone(), job.clone());
        let found =
            blocking(move || shared.find_cached(&cached)?.map(|code| shared.link(&cached, code)).transpose()).await?;
        if let Some(program) = found {
            return Ok(program);
        }
        let _permit = self.permits.acquire().await.map_err(|_| stopping())?;
        let shared = self.clone();
        blocking(move || {
            // Another process may have compiled it while this one waited.
            let code = match shared.find_cached(&job)? {
                Some(code) => code,
                None => shared.compile(&job)?,
            };
            shared.link(&job, code)
        })
        .await
    }

    fn find_cached(&self, job: &Job) -> Result<Option<Code>, LoadError> {
        let Ok(cache) = Cache::open(&self.compiler.settings.cache_dir)? else { return Ok(None) };
        let start = Instant::now();
        let Some(file) = cache.find(&job.key) else { return Ok(None) };
        match map(&self.engines.get(job.kind)?, job.format, &file) {
            Ok(code) => {
                debug!(module = job.name, key = %job.key, elapsed_us = start.elapsed().as_micros() as u64, "mapped from the cache");
                Ok(Some(code))
            }
            Err(error) => {
                cache.discard(&job.key, &format!("{error:#}"));
                Ok(None)
            }
        }
    }

    fn compile(&self, job: &Job) -> Result<Code, LoadError> {
        let start = Instant::now();
        let compiled = self.compiler.compile(job.kind, &sealed(&job.wasm)?)?;
        let elapsed_ms = start.elapsed().as_millis() as u64;
        let code_bytes = compiled.metadata().map(|metadata| metadata.len()).unwrap_or_default();
        info!(module = job.name, key = %job.key, wasm_bytes = job.wasm.len(), code_bytes, elapsed_ms, "compiled");
        let folder = &self.compiler.settings.cache_dir;
        let file = match Cache::open(folder)?.and_then(|cache| cache.store(&job.key, &compiled)) {
            Ok(stored) => stored,
            Err(error) => {
                let folder = folder.display();
                warn!(module = job.name, %folder, %error, "the compiled code cannot be cached; it is used from memory");
                compiled
            }
        };
        map(&self.engines.get(job.kind)?, job.format, &file)
            .map_err(|error| LoadError::internal(format!("the compiled code is not accepted: {error:#}")))
    }

    fn link(&self, job: &Job, code: Code) -> Loaded<T> {
        (self.link)(&self.engines, job.kind, code).map(Arc::new)
    }
}

/// Everything the compiled code depends on. Fixed lengths first, so that no two inputs read the same.
fn key(wasm: &[u8], kind: Kind, fingerprint: &[u8; 32]) -> Key {
    let mut hash = Sha256::new_with_prefix(Sha256::digest(wasm));
    hash.update(fingerprint);
    hash.update(kind.word());
    hash.update([0]);
    hash.update(env!("CARGO_PKG_VERSION"));
    Key(hash.finalize().into())
}

/// Makes the file executable code: mapped, or copied into memory where the file system forbids mapping code (noexec).
fn map(engine: &Engine, format: Format, mut file: &File) -> wasmtime::Result<Code> {
    // By descriptor: the file that was checked is the one that is mapped.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    // SAFETY: two things are asked for. The bytes are wasmtime's own: they were written by our worker under this key, and
    // since then either the file is sealed (memory) or its digest over contents and key was just found right (cache). And
    // they stay as they are: a sealed file cannot change; in the cache, a folder closed to everyone but our user, files
    // are complete before they have a name and are only ever unlinked (`cache.rs`). Wasmtime checks version, settings and
    // CPU features itself. That the worker was not taken over by the module is assumed (`compile.rs`).
    let mapped = unsafe {
        match format {
            Format::Module => Module::deserialize_file(engine, &path).map(Code::Module),
            Format::Component => Component::deserialize_file(engine, &path).map(Code::Component),
        }
    };
    let error = match mapped {
        Ok(code) => return Ok(code),
        Err(error) => error,
    };
    let mut bytes = Vec::new();
    std::io::Seek::rewind(&mut file)?;
    file.read_to_end(&mut bytes)?;
    // SAFETY: the same bytes, and the copy is ours alone.
    let code = unsafe {
        match format {
            Format::Module => Module::deserialize(engine, bytes).map(Code::Module),
            Format::Component => Component::deserialize(engine, bytes).map(Code::Component),
        }
    }?;
    warn!(error = format!("{error:#}"), "compiled code cannot be mapped (a noexec mount?); a copy in memory is used");
    Ok(code)
}

/// Runs `job` on a blocking thread; its panic is this caller's error and nobody else's.
async fn blocking<R: Send + 'static>(
    job: impl FnOnce() -> Result<R, LoadError> + Send + 'static,
) -> Result<R, LoadError> {
    match tokio::task::spawn_blocking(job).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => Err(LoadError::internal("a panic while loading; the log has more")),
        Err(_) => Err(stopping()),
    }
}

fn stopping() -> LoadError {
    LoadError::internal("the shim is shutting down; try again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keys_are_stable_and_depend_on_everything(wasm in proptest::collection::vec(any::<u8>(), 0..100), extra in any::<u8>()) {
            let one = key(&wasm, Kind::Command, &[1; 32]);
            prop_assert!(one == key(&wasm, Kind::Command, &[1; 32]));
            prop_assert!(one != key(&wasm, Kind::Command, &[2; 32]));
            prop_assert!(one != key(&[&wasm[..], &[extra]].concat(), Kind::Command, &[1; 32]));
        }
    }

    #[tokio::test]
    async fn what_is_refused_at_first_sight_starts_no_worker() {
        let mut settings = CompileSettings::new("/nonexistent/cache");
        settings.worker = "/nonexistent/worker".into();
        let programs = Programs::new(Engines::new(), settings, |_, _, _| Ok(()));
        let error = programs.load("/bin/ls", b"\x7fELF\x02\x01\x01\0".to_vec(), Bounds::default()).await.unwrap_err();
        assert!(matches!(error, LoadError::NotWasm { .. }));
        let error = programs.load("/app.wasm", b"\0asm\x01\0\0\0".to_vec(), Bounds::default()).await.unwrap_err();
        assert!(error.to_string().contains("worker cannot be started"), "{error}");
        programs.close().await;
    }
}
