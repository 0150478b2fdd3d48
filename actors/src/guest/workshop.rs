//! Where code comes from: the cache, or a worker and then the cache. Shared work is done once, by one process.
//!
//! ```text
//!   job ─▶ cache ─▶ map ─▶ done
//!            └ miss ─▶ permit ─▶ turn for the key ─▶ slot ─▶ cache ─▶ map
//!                      (of us)   (one process)     (of all)  └ miss ─▶ worker ─▶ store ─▶ map
//! ```
//! The permits leave a core to the guests of this process, the slots one to those of all processes. The turn for a key
//! makes the other processes wait for what one compiles, instead of compiling it too; it is taken when nothing but a slot
//! is missing, so that a process with many modules does not keep others from the ones at the end of its queue. Both waits
//! between processes end: turns with the time a compile may take, slots soon, because other tenants fill them and must not
//! be able to stop this one. Then it compiles without.
//!
//! Locks are tried again and again: the kernel can neither wait for one of several nor give up at a deadline.
//!
//! Called by `module.rs` (containers) and `prewarm.rs` (the verb `compile`).

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::LoadError;
use super::cache::{Cache, Key};
use super::code::{Code, map};
use super::compile::{CompileSettings, Compiler, sealed};
use super::engine::{Bounds, Engines};
use super::job::{self, Job};
use super::known::Known;
use super::text::to_binary;
use super::turn::Turn;
use crate::blocking::blocking;
use crate::image::Content;

/// How often a lock that another process holds is tried.
const AGAIN: Duration = Duration::from_millis(20);
/// How long a compile waits for its slot among those of all processes.
const SLOT_PATIENCE: Duration = Duration::from_secs(10);
/// Between the end of another's compile and its entry: writing and tidying.
const STORE_TIME: Duration = Duration::from_secs(5);

/// Makes code out of jobs.
pub(super) struct Workshop {
    pub engines: Engines,
    compiler: Compiler,
    permits: Semaphore,
    known: Known,
    ending: CancellationToken,
}

/// Code, and where it came from.
pub(super) struct Made {
    pub code: Code,
    /// Of the file it was mapped from.
    pub bytes: u64,
    pub origin: Origin,
}

pub(super) enum Origin {
    /// It was there.
    Found,
    /// It was not; it is now.
    Stored,
    /// It was not, and the cache did not take it, for this reason.
    NotStored(io::Error),
}

impl Workshop {
    pub fn new(engines: Engines, settings: CompileSettings) -> Self {
        let permits = Semaphore::new(settings.parallel.max(1));
        let (compiler, known) = (Compiler::new(settings), Known::default());
        Self { engines, compiler, permits, known, ending: CancellationToken::new() }
    }

    /// What these bytes are. Counts as a use of their entry, which may be in memory and never be looked up.
    pub async fn job(self: &Arc<Self>, name: &str, wasm: Vec<u8>, bounds: Bounds) -> Result<Job, LoadError> {
        let (shop, name) = (self.clone(), name.to_owned());
        loading(move || shop.inspected(name, wasm, bounds)).await
    }

    /// The same for a layer, which is read only if nobody knows what it is.
    pub async fn job_of_layer(
        self: &Arc<Self>,
        name: &str,
        content: Arc<dyn Content>,
        bounds: Bounds,
    ) -> Result<Job, LoadError> {
        let (shop, name) = (self.clone(), name.to_owned());
        loading(move || {
            let Some((key, kind, format)) = shop.known.about(&content.digest(), bounds, &shop.engines, shop.cache())
            else {
                return shop.inspected(name, job::read(&*content)?, bounds);
            };
            shop.used(&key);
            Ok(Job::of_layer(name, key, kind, format, content))
        })
        .await
    }

    fn inspected(&self, name: String, wasm: Vec<u8>, bounds: Bounds) -> Result<Job, LoadError> {
        let wasm = to_binary(&self.compiler, wasm)?;
        let sum = job::sum(&wasm);
        let job = Job::new(name, wasm, sum, bounds, &self.engines, self.settings().max_module_size)?;
        self.known.learn(sum, job.kind, job.format);
        self.used(&job.key);
        Ok(job)
    }

    fn used(&self, key: &Key) {
        if let Some(cache) = self.cache() {
            cache.touch(key);
        }
    }

    /// The folder, if it can be had: what is wrong with it is told by whoever needs it.
    fn cache(&self) -> Option<Cache> {
        Cache::open(&self.settings().cache_dir).ok()?.ok()
    }

    /// The code for a job. What it waits for, [`Workshop::close`] ends.
    pub async fn make(self: &Arc<Self>, job: &Arc<Job>) -> Result<Made, LoadError> {
        if let Some(made) = self.look(job).await? {
            return Ok(made);
        }
        let permit = tokio::select! {
            permit = self.permits.acquire() => permit,
            () = self.ending.cancelled() => return Err(stopping()),
        };
        let _permit = permit.map_err(|_| stopping())?;
        let (turn, waited) = self.turn(job).await?;
        if waited && let Some(made) = self.look(job).await? {
            return Ok(made);
        }
        let slot = self.slot().await?;
        let (shop, job) = (self.clone(), job.clone());
        loading(move || {
            let made = match shop.find(&job)? {
                Some(made) => Ok(made),
                None => shop.compile(&job),
            };
            drop((slot, turn));
            made
        })
        .await
    }

    /// Ends the compiles that run and the waits for others; later jobs fail.
    pub fn close(&self) {
        self.ending.cancel();
        self.compiler.close();
    }

    pub fn settings(&self) -> &CompileSettings {
        &self.compiler.settings
    }

    /// Told when it is closed.
    pub fn ending(&self) -> CancellationToken {
        self.ending.clone()
    }

    async fn look(self: &Arc<Self>, job: &Arc<Job>) -> Result<Option<Made>, LoadError> {
        let (shop, job) = (self.clone(), job.clone());
        loading(move || shop.find(&job)).await
    }

    fn find(&self, job: &Job) -> Result<Option<Made>, LoadError> {
        let Ok(cache) = Cache::open(&self.compiler.settings.cache_dir)? else { return Ok(None) };
        let start = Instant::now();
        let Some(file) = cache.find(&job.key) else { return Ok(None) };
        match map(&self.engines.get(job.kind)?, job.format, &file) {
            Ok(code) => {
                debug!(module = job.name, key = %job.key, elapsed_us = start.elapsed().as_micros() as u64, "mapped from the cache");
                Ok(Some(Made { code, bytes: length(&file), origin: Origin::Found }))
            }
            Err(error) => {
                cache.discard(&job.key, &format!("{error:#}"));
                Ok(None)
            }
        }
    }

    fn compile(&self, job: &Job) -> Result<Made, LoadError> {
        let start = Instant::now();
        let wasm = job.wasm()?;
        let compiled = self.compiler.compile(job.kind, &sealed(&wasm)?)?;
        let elapsed_ms = start.elapsed().as_millis() as u64;
        let code_bytes = length(&compiled);
        info!(module = job.name, key = %job.key, wasm_bytes = wasm.len(), code_bytes, elapsed_ms, "compiled");
        let settings = &self.compiler.settings;
        let stored = Cache::open(&settings.cache_dir)?
            .and_then(|cache| cache.store(&job.key, &compiled, settings.cache_max_size));
        let (file, origin) = match stored {
            Ok(stored) => (stored, Origin::Stored),
            Err(error) => {
                let folder = settings.cache_dir.display();
                warn!(module = job.name, %folder, %error, "the compiled code cannot be cached; it is used from memory");
                (compiled, Origin::NotStored(error))
            }
        };
        let code = map(&self.engines.get(job.kind)?, job.format, &file)
            .map_err(|error| LoadError::internal(format!("the compiled code is not accepted: {error:#}")))?;
        Ok(Made { code, bytes: length(&file), origin })
    }

    /// The turn to compile this key, and whether somebody else had it first.
    async fn turn(self: &Arc<Self>, job: &Arc<Job>) -> Result<(Option<Turn>, bool), LoadError> {
        let names = Arc::new(vec![job.key.to_string()]);
        let waiting = || debug!(module = job.name, key = %job.key, "another process compiles it; waiting");
        let patience = self.compiler.settings.timeout + SLOT_PATIENCE + STORE_TIME;
        let (turn, waited) = self.take(names, patience, waiting).await?;
        if waited && turn.is_none() {
            warn!(module = job.name, key = %job.key, ?patience, "another process does not get done with compiling it");
        }
        Ok((turn, waited))
    }

    /// One of the slots that all processes share.
    async fn slot(self: &Arc<Self>) -> Result<Option<Turn>, LoadError> {
        let count = self.compiler.settings.parallel.max(1);
        let names = Arc::new((0..count).map(|number| format!("slot-{number}")).collect());
        let waiting = || debug!("other processes compile; waiting");
        Ok(self.take(names, SLOT_PATIENCE, waiting).await?.0)
    }

    /// The first turn of these that is free within `patience`, or none; and whether it had to be waited for.
    async fn take(
        self: &Arc<Self>,
        names: Arc<Vec<String>>,
        patience: Duration,
        waiting: impl FnOnce(),
    ) -> Result<(Option<Turn>, bool), LoadError> {
        let deadline = Instant::now() + patience;
        let mut waiting = Some(waiting);
        loop {
            let (shop, wanted) = (self.clone(), names.clone());
            match loading(move || Ok(shop.free(&wanted))).await? {
                Ok(Some(turn)) => return Ok((Some(turn), waiting.is_none())),
                Ok(None) if Instant::now() < deadline => {}
                Ok(None) => return Ok((None, true)),
                Err(error) => {
                    debug!(%error, "no turns among processes here");
                    return Ok((None, waiting.is_none()));
                }
            }
            if let Some(waiting) = waiting.take() {
                waiting();
            }
            tokio::select! {
                () = tokio::time::sleep(AGAIN) => {}
                () = self.ending.cancelled() => return Err(stopping()),
            }
        }
    }

    fn free(&self, names: &[String]) -> io::Result<Option<Turn>> {
        let cache = Cache::open(&self.compiler.settings.cache_dir).map_err(io::Error::other)??;
        for name in names {
            if let Some(turn) = cache.turn(name)? {
                return Ok(Some(turn));
            }
        }
        Ok(None)
    }
}

fn length(file: &File) -> u64 {
    file.metadata().map_or(0, |metadata| metadata.len())
}

/// Loads on a blocking thread; a panic is this caller's error and nobody else's.
pub(super) async fn loading<R: Send + 'static>(
    job: impl FnOnce() -> Result<R, LoadError> + Send + 'static,
) -> Result<R, LoadError> {
    blocking(job).await.unwrap_or_else(|panicked| Err(LoadError::internal(format!("while loading: {panicked}"))))
}

pub(super) fn stopping() -> LoadError {
    LoadError::internal("the shim is shutting down; try again")
}
