//! The engines of the process: few, made on first use, one for each kind of guest.
//!
//! Invariant: the daemon and the compile worker describe an engine with the same function, [`config`]. Code compiled under
//! one configuration and run under another would be refused by wasmtime at best, so nothing else may touch the settings.
//! The daemon's engines are built without the compiler: they only map code, and cranelift's memory stays in the worker.
//!
//! Called by `module.rs` (the daemon) and `worker.rs` (the child).

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};
use wasmtime::{Config, Engine, InstanceAllocationStrategy, OptLevel, Strategy, WasmBacktraceDetails};

use super::LoadError;
use super::pool::{self, Reset};
use super::swap::Watch;

/// What a guest is, as far as the best engine settings depend on it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// A program that is started once and runs until it returns.
    Command,
    /// A `wasi:http` 0.2 server: a fresh instance for each request, so that instances have to be cheap.
    Http(Bounds),
    /// Anything of WASI 0.3: several calls run in one instance at a time, which costs every call something.
    Concurrent,
}

/// How a guest's accesses to its memory are kept inside it: a price at instantiation or one at every access.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Bounds {
    /// A comparison before each access: heaps grow without a system call.
    #[default]
    Explicit,
    /// Guard pages: accesses are free, and growth is an `mprotect`.
    Guarded,
}

impl Kind {
    /// The word for it in the worker's orders and in the cache's keys.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Command => "command",
            Self::Http(Bounds::Explicit) => "http",
            Self::Http(Bounds::Guarded) => "http-guarded",
            Self::Concurrent => "concurrent",
        }
    }

    /// The same, with these bounds if it is for servers that have a choice.
    pub(super) fn bounded(self, bounds: Bounds) -> Self {
        match self {
            Self::Http(_) => Self::Http(bounds),
            Self::Command | Self::Concurrent => self,
        }
    }

    pub(super) fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.word() == word)
    }

    const ALL: [Self; 4] = [Self::Command, Self::Http(Bounds::Explicit), Self::Http(Bounds::Guarded), Self::Concurrent];
}

/// Most of a guest's own stack; as much again remains for the host functions it calls. Only touched pages count.
const WASM_STACK: usize = 512 << 10;

/// One engine for each kind of guest that was asked for.
#[derive(Clone, Default)]
pub struct Engines {
    made: Arc<Mutex<Made>>,
}

#[derive(Default)]
struct Made {
    engines: HashMap<(Kind, Reset), Engine>,
    fingerprints: HashMap<Kind, [u8; 32]>,
}

impl Engines {
    pub fn new() -> Self {
        Self::default()
    }

    /// The engine for this kind of guest, made now if nobody asked before.
    pub fn get(&self, kind: Kind) -> Result<Engine, LoadError> {
        let reset = match kind {
            Kind::Http(_) if Watch::get().is_resident() => Reset::Scan,
            Kind::Command | Kind::Http(_) | Kind::Concurrent => Reset::Remap,
        };
        self.engine(kind, reset)
    }

    /// The one that stays right when pages leave memory (see `pool`); runs the same code.
    pub(super) fn get_remapping(&self, kind: Kind) -> Result<Engine, LoadError> {
        self.engine(kind, Reset::Remap)
    }

    /// The engines that exist: those whose epochs have to be ticked.
    pub fn made(&self) -> Vec<Engine> {
        self.lock().engines.values().cloned().collect()
    }

    /// Everything the compiled code of this kind depends on besides the module: wasmtime's version, settings, CPU features.
    pub(super) fn fingerprint(&self, kind: Kind) -> Result<[u8; 32], LoadError> {
        let mut made = self.lock();
        if let Some(fingerprint) = made.fingerprints.get(&kind) {
            return Ok(*fingerprint);
        }
        // The compatibility hash covers the CPU's features only when the engine has a compiler, so one is made for the
        // hash alone and dropped: well under a millisecond, once per kind.
        let fingerprint = fingerprint(&compiling(kind)?);
        Ok(*made.fingerprints.entry(kind).or_insert(fingerprint))
    }

    fn engine(&self, kind: Kind, reset: Reset) -> Result<Engine, LoadError> {
        let mut made = self.lock();
        if let Some(engine) = made.engines.get(&(kind, reset)) {
            return Ok(engine.clone());
        }
        let mut config = config(kind);
        config.enable_compiler(false);
        let engine = match kind {
            Kind::Http(_) => pooled(config, reset)?,
            Kind::Command | Kind::Concurrent => new_engine(&config)?,
        };
        Ok(made.engines.entry((kind, reset)).or_insert(engine).clone())
    }

    fn lock(&self) -> MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An engine that can compile: for the worker, and for the fingerprint.
pub(super) fn compiling(kind: Kind) -> Result<Engine, LoadError> {
    let mut config = config(kind);
    config.strategy(Strategy::Cranelift).cranelift_opt_level(OptLevel::Speed);
    new_engine(&config)
}

/// The settings both processes share. Those of the compiler proper are in [`compiling`].
fn config(kind: Kind) -> Config {
    let mut config = Config::new();
    match kind {
        Kind::Command => commands(&mut config),
        Kind::Http(bounds) => servers(&mut config, bounds),
        Kind::Concurrent => concurrent(&mut config),
    }
    config
        .epoch_interruption(true)
        // Otherwise taken from an environment variable, which the worker would not share with the daemon.
        .wasm_backtrace_details(WasmBacktraceDetails::Disable)
        // Traps walk frame pointers; unwind tables would be registered with the process for every module.
        .native_unwind_info(false)
        .debug_info(false);
    config
}

fn commands(config: &mut Config) {
    config
        // Not the pool: it is a fixed number of slots, and nobody knows how many commands will sleep at once. A command
        // is instantiated once in its life, so the few system calls a pool would save do not count.
        .allocation_strategy(InstanceAllocationStrategy::OnDemand)
        // Guard pages instead of bounds checks: a command computes, and address space is plenty (4 GiB of 128 TiB each).
        .signals_based_traps(true)
        // Data segments are mapped from the cached file: untouched pages of a sleeping guest are shared with the rest.
        .memory_init_cow(true)
        .max_wasm_stack(WASM_STACK)
        .async_stack_size(2 * WASM_STACK)
        .concurrency_support(false);
}

/// What the compiled code of a server depends on; where its instances live is `pool`'s business.
fn servers(config: &mut Config, bounds: Bounds) {
    config
        .memory_init_cow(true)
        // Bookkeeping for calls that run side by side in one instance: 0.2 has none.
        .concurrency_support(false)
        .max_wasm_stack(WASM_STACK)
        .async_stack_size(2 * WASM_STACK);
    match bounds {
        // Only both together let a heap grow without changing the protection of pages.
        Bounds::Explicit => config.signals_based_traps(false).memory_guard_size(0),
        Bounds::Guarded => config.signals_based_traps(true),
    };
}

fn concurrent(config: &mut Config) {
    commands(config);
    config.concurrency_support(true);
}

/// With a pool, or without one where there is no address space for it (a limit, a strict overcommit policy): then every
/// request pays for mappings of its own.
fn pooled(mut config: Config, reset: Reset) -> Result<Engine, LoadError> {
    config.allocation_strategy(pool::strategy(reset));
    new_engine(&config).or_else(|error| {
        tracing::warn!(%error, "servers run without a pool of instances: requests cost several times as much");
        config.allocation_strategy(InstanceAllocationStrategy::OnDemand);
        new_engine(&config)
    })
}

fn new_engine(config: &Config) -> Result<Engine, LoadError> {
    Engine::new(config).map_err(|error| LoadError::internal(format!("the engine cannot be made: {error:#}")))
}

/// The engine's compatibility hash, kept whole: `Hasher` would give 64 bits.
fn fingerprint(engine: &Engine) -> [u8; 32] {
    struct Feed(Sha256);
    impl Hasher for Feed {
        fn write(&mut self, bytes: &[u8]) {
            self.0.update(bytes);
        }
        fn finish(&self) -> u64 {
            0
        }
    }
    let mut feed = Feed(Sha256::new());
    engine.precompile_compatibility_hash().hash(&mut feed);
    feed.0.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_is_made_once_for_each_kind() {
        let engines = Engines::new();
        assert!(engines.made().is_empty());
        let first = engines.get(Kind::Command).unwrap();
        let second = engines.clone().get(Kind::Command).unwrap();
        assert!(Engine::same(&first, &second));
        assert_eq!(engines.made().len(), 1);
    }

    #[test]
    fn the_fingerprint_is_the_same_in_every_process_of_a_build() {
        let one = Engines::new().fingerprint(Kind::Command).unwrap();
        let other = Engines::new().fingerprint(Kind::Command).unwrap();
        assert_eq!(one, other);
    }

    #[test]
    fn every_kind_has_an_engine() {
        let engines = Engines::new();
        for kind in Kind::ALL {
            engines.get(kind).unwrap();
            engines.get_remapping(kind).unwrap();
            compiling(kind).unwrap();
        }
    }

    #[test]
    fn the_daemon_loads_what_the_worker_compiles_but_compiles_nothing() {
        let daemon = Engines::new().get(Kind::Command).unwrap();
        let code = compiling(Kind::Command).unwrap().precompile_module(b"\0asm\x01\0\0\0").unwrap();
        // SAFETY: the bytes come straight from the compiler above.
        let module = unsafe { wasmtime::Module::deserialize(&daemon, code) };
        module.unwrap();
        assert!(daemon.precompile_module(b"\0asm\x01\0\0\0").is_err());
    }

    #[test]
    fn every_kind_is_found_by_its_word() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_word(kind.word()), Some(kind));
        }
        assert_eq!(Kind::from_word("nonsense"), None);
    }
}
