//! The engines of the process: few, made on first use, one for each kind of guest.
//!
//! Invariant: the daemon and the compile worker describe an engine with the same function, [`config`]. Code compiled under
//! one configuration and run under another would be refused by wasmtime at best, so nothing else may touch the settings.
//! The daemon's engines are built without the compiler: they only map code, and cranelift's memory stays in the worker.
//!
//! Called by `module.rs` (the daemon) and `worker.rs` (the child).

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};
use wasmtime::{Config, Engine, InstanceAllocationStrategy, OptLevel, Strategy, WasmBacktraceDetails};

use super::LoadError;

/// What a guest is, as far as the best engine settings depend on it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// A program that is started once and runs until it returns.
    Command,
}

impl Kind {
    /// The word for it in the worker's orders and in the cache's keys.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Command => "command",
        }
    }

    pub(super) fn from_word(word: &str) -> Option<Self> {
        [Self::Command].into_iter().find(|kind| kind.word() == word)
    }
}

/// One engine for each kind of guest that was asked for.
#[derive(Clone, Default)]
pub struct Engines {
    made: Arc<Mutex<HashMap<Kind, Made>>>,
}

#[derive(Clone)]
struct Made {
    engine: Engine,
    fingerprint: [u8; 32],
}

impl Engines {
    pub fn new() -> Self {
        Self::default()
    }

    /// The engine for this kind of guest, made now if nobody asked before.
    pub fn get(&self, kind: Kind) -> Result<Engine, LoadError> {
        Ok(self.made_for(kind)?.engine)
    }

    /// The engines that exist: those whose epochs have to be ticked.
    pub fn made(&self) -> Vec<Engine> {
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.values().map(|made| made.engine.clone()).collect()
    }

    /// Everything the compiled code of this kind depends on besides the module: wasmtime's version, settings, CPU features.
    pub(super) fn fingerprint(&self, kind: Kind) -> Result<[u8; 32], LoadError> {
        Ok(self.made_for(kind)?.fingerprint)
    }

    fn made_for(&self, kind: Kind) -> Result<Made, LoadError> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = made.get(&kind) {
            return Ok(made.clone());
        }
        // The compatibility hash covers the CPU's features only when the engine has a compiler, so one is made for the
        // hash alone and dropped: well under a millisecond, once per kind.
        let fingerprint = fingerprint(&compiling(kind)?);
        let engine = new_engine(config(kind).enable_compiler(false))?;
        Ok(made.entry(kind).or_insert(Made { engine, fingerprint }).clone())
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
        // Only touched pages of a stack count; half of it remains for the host functions a guest calls.
        .max_wasm_stack(512 << 10)
        .async_stack_size(1 << 20);
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
        assert_eq!(Kind::from_word(Kind::Command.word()), Some(Kind::Command));
        assert_eq!(Kind::from_word("nonsense"), None);
    }
}
