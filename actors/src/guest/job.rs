//! A program that somebody wants: its bytes, what they are, and the key that its compiled code goes by.
//!
//! Invariant: the key is made here and nowhere else, so whoever fills the cache ahead and whoever starts a container look
//! for the same file. Called by `workshop.rs`, on blocking threads: hashing megabytes takes its time.

use sha2::{Digest, Sha256};

use super::LoadError;
use super::cache::Key;
use super::engine::{Bounds, Engines, Kind};
use super::inspect::{Format, inspect};
use super::nature::Nature;

/// One program on its way.
pub(super) struct Job {
    /// The name the first one who asked has for it; for the log only.
    pub name: String,
    pub key: Key,
    pub kind: Kind,
    pub format: Format,
    pub wasm: Vec<u8>,
}

impl Job {
    /// Refuses at once what needs no compiler to be refused.
    pub fn new(name: String, wasm: Vec<u8>, bounds: Bounds, engines: &Engines, most: u64) -> Result<Self, LoadError> {
        let format = inspect(&wasm, most)?;
        let kind = kind(format, &wasm, bounds);
        let key = key(&wasm, kind, &engines.fingerprint(kind)?);
        Ok(Self { name, key, kind, format, wasm })
    }
}

/// The engine for it; `bounds` matters to servers only.
fn kind(format: Format, wasm: &[u8], bounds: Bounds) -> Kind {
    match format {
        Format::Module => Kind::Command,
        Format::Component => Nature::of(wasm).kind(bounds),
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
            prop_assert!(one != key(&wasm, Kind::Concurrent, &[1; 32]));
            prop_assert!(one != key(&[&wasm[..], &[extra]].concat(), Kind::Command, &[1; 32]));
        }
    }
}
