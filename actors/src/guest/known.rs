//! What is known of modules by their digests alone, so that a layer of an image need not be read to be run.
//!
//! Which engine runs a module is told by its bytes, and the key of its code depends on it. So it is remembered for the
//! modules that this process has looked at; for others the cache is asked, which has an entry only under the key of the
//! right engine. Invariant: nothing is known of a digest that did not come from bytes which have it. Text is never known:
//! the digest of a layer of text is not that of the module it stands for.
//!
//! Called by `workshop.rs`.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::cache::{Cache, Key};
use super::code;
use super::engine::{Bounds, Engines, Kind};
use super::inspect::Format;
use super::job::{self, Sum};

/// Where so many are known, they are forgotten: it costs a look into the cache each.
const MOST: usize = 4096;

/// The modules that were seen.
#[derive(Default)]
pub(super) struct Known(Mutex<HashMap<Sum, (Kind, Format)>>);

impl Known {
    /// Bytes of this digest were found to be this.
    pub fn learn(&self, sum: Sum, kind: Kind, format: Format) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(sum, (kind, format));
    }

    /// Key, engine and format of the module of this digest.
    pub fn about(
        &self,
        sum: &Sum,
        bounds: Bounds,
        engines: &Engines,
        cache: Option<Cache>,
    ) -> Option<(Key, Kind, Format)> {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(sum).copied();
        // Whatever keeps an engine from being described is told by whoever loads the module.
        let key = |kind: Kind| Some(job::key(sum, kind, &engines.fingerprint(kind).ok()?));
        if let Some((kind, format)) = seen {
            let kind = kind.bounded(bounds);
            return Some((key(kind)?, kind, format));
        }
        let cache = cache?;
        [Kind::Command, Kind::Http(bounds), Kind::Concurrent].into_iter().find_map(|kind| {
            let key = key(kind)?;
            Some((key, kind, code::format(&cache.peek(&key).ok()?)?))
        })
    }
}
