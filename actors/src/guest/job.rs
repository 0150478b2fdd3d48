//! A program that somebody wants: its bytes, what they are, and the key that its compiled code goes by.
//!
//! Invariants. The key is made here and nowhere else, so whoever fills the cache ahead and whoever starts a container look
//! for the same file. A layer of an image may go by the digest that its manifest lists, but whatever is compiled under a
//! key has the digest that is in it: bytes that are read later are compared first.
//!
//! Called by `workshop.rs`, on blocking threads: hashing megabytes takes its time.

use std::borrow::Cow;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::LoadError;
use super::cache::Key;
use super::engine::{Bounds, Engines, Kind};
use super::inspect::{Format, inspect};
use super::nature::Nature;
use crate::error::Error;
use crate::image::Content;

/// One program on its way.
pub(super) struct Job {
    /// The name the first one who asked has for it; for the log only.
    pub name: String,
    pub key: Key,
    pub kind: Kind,
    pub format: Format,
    wasm: Wasm,
}

/// A program's bytes, or where they are.
enum Wasm {
    Here(Vec<u8>),
    Layer(Arc<dyn Content>),
}

/// The SHA-256 of a wasm binary.
pub(super) type Sum = [u8; 32];

impl Job {
    /// Refuses at once what needs no compiler to be refused. `sum` is that of the bytes.
    pub fn new(
        name: String,
        wasm: Vec<u8>,
        sum: Sum,
        bounds: Bounds,
        engines: &Engines,
        most: u64,
    ) -> Result<Self, LoadError> {
        let format = inspect(&wasm, most)?;
        let kind = kind(format, &wasm, bounds);
        let key = key(&sum, kind, &engines.fingerprint(kind)?);
        Ok(Self { name, key, kind, format, wasm: Wasm::Here(wasm) })
    }

    /// A layer of which it is known what its bytes are. `key` is the one for its digest and this kind.
    pub fn of_layer(name: String, key: Key, kind: Kind, format: Format, content: Arc<dyn Content>) -> Self {
        Self { name, key, kind, format, wasm: Wasm::Layer(content) }
    }

    /// The bytes to compile. Those of a layer are read now.
    pub fn wasm(&self) -> Result<Cow<'_, [u8]>, LoadError> {
        match &self.wasm {
            Wasm::Here(wasm) => Ok(Cow::Borrowed(wasm)),
            Wasm::Layer(content) => read(&**content).map(Cow::Owned),
        }
    }
}

/// Reads a layer, and sees that it is the one that was meant.
pub(super) fn read(content: &dyn Content) -> Result<Vec<u8>, LoadError> {
    let wasm = content.read().map_err(|error| match error {
        Error::Program(why) => LoadError::damaged(why),
        error => LoadError::unreachable(error.to_string()),
    })?;
    if sum(&wasm) == content.digest() {
        return Ok(wasm);
    }
    Err(LoadError::damaged("the image's layer is damaged: its content has another digest"))
}

pub(super) fn sum(wasm: &[u8]) -> Sum {
    Sha256::digest(wasm).into()
}

/// The engine for it; `bounds` matters to servers only.
fn kind(format: Format, wasm: &[u8], bounds: Bounds) -> Kind {
    match format {
        Format::Module => Kind::Command,
        Format::Component => Nature::of(wasm).kind(bounds),
    }
}

/// Everything the compiled code depends on. Fixed lengths first, so that no two inputs read the same.
pub(super) fn key(wasm: &Sum, kind: Kind, fingerprint: &[u8; 32]) -> Key {
    let mut hash = Sha256::new_with_prefix(wasm);
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
            let (wasm, other) = (sum(&wasm), sum(&[&wasm[..], &[extra]].concat()));
            let one = key(&wasm, Kind::Command, &[1; 32]);
            prop_assert!(one == key(&wasm, Kind::Command, &[1; 32]));
            prop_assert!(one != key(&wasm, Kind::Command, &[2; 32]));
            prop_assert!(one != key(&wasm, Kind::Concurrent, &[1; 32]));
            prop_assert!(one != key(&other, Kind::Command, &[1; 32]));
        }
    }
}
