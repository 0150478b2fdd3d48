//! Filling the cache before any container asks: what the verb `compile` does.
//!
//! Goes the way a container's start goes (`workshop.rs`), so the keys are the ones that a start looks for, and what is
//! found here was checked and could be mapped. Unlike there, code that cannot be stored is a failure.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::LoadError;
use super::compile::CompileSettings;
use super::engine::{Bounds, Engines};
use super::workshop::{Origin, Workshop};

/// Fills one cache folder.
pub struct Prewarm {
    shop: Arc<Workshop>,
}

/// One entry of the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name of its file.
    pub key: String,
    /// The word for the engine that runs it.
    pub kind: &'static str,
    /// Of its file.
    pub bytes: u64,
    /// Compiled just now; else it was there.
    pub compiled: bool,
    /// How long it took to compile it, or to find it.
    pub took: Duration,
}

impl Prewarm {
    pub fn new(settings: CompileSettings) -> Self {
        Self { shop: Arc::new(Workshop::new(Engines::new(), settings)) }
    }

    /// Sees to it that the cache has the code of this program, for servers with each of these `bounds`.
    ///
    /// # Errors
    /// What a container's start would say, and when the code cannot be stored.
    pub async fn fill(&self, name: &str, wasm: &[u8], bounds: &[Bounds]) -> Result<Vec<Entry>, LoadError> {
        let mut entries: Vec<Entry> = Vec::new();
        for bounds in bounds {
            let entry = self.one(name, wasm.to_vec(), *bounds).await.map_err(|error| error.about(name))?;
            // Only servers are different code with other bounds.
            if !entries.iter().any(|known| known.key == entry.key) {
                entries.push(entry);
            }
        }
        Ok(entries)
    }

    async fn one(&self, name: &str, wasm: Vec<u8>, bounds: Bounds) -> Result<Entry, LoadError> {
        let start = Instant::now();
        let job = Arc::new(self.shop.job(name, wasm, bounds).await?);
        let made = self.shop.make(&job).await?;
        let compiled = match made.origin {
            Origin::Found => false,
            Origin::Stored => true,
            Origin::NotStored(error) => {
                let folder = self.shop.settings().cache_dir.display();
                return Err(LoadError::internal(format!("the cache folder {folder} does not take it: {error}")));
            }
        };
        let (key, kind) = (job.key.to_string(), job.kind.word());
        Ok(Entry { key, kind, bytes: made.bytes, compiled, took: start.elapsed() })
    }
}
