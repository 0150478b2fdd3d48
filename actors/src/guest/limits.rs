//! The memory budget of a container, shared by all its stores.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use wasmtime::{ResourceLimiter, Result};

/// Size of a table element in the host, in bytes.
const TABLE_ELEMENT: u64 = 8;

/// What a container may use and what it uses, in bytes. Counted is what guests reserved (linear memories and tables),
/// touched or not: the figure a limit can be promised on.
#[derive(Debug)]
pub struct Budget {
    /// The largest number is no limit.
    limit: AtomicU64,
    used: AtomicU64,
    peak: AtomicU64,
    exceeded: AtomicBool,
}

/// The guest wanted more than its container may have; ends it (exit code 137, TaskOOM).
#[derive(Debug, thiserror::Error)]
#[error("out of memory: {wanted} bytes more than the {used} in use exceed the container's limit of {limit}")]
pub struct OutOfMemory {
    wanted: u64,
    used: u64,
    limit: u64,
}

impl Budget {
    /// A budget of `limit` bytes, or an unlimited one.
    pub fn new(limit: Option<u64>) -> Arc<Self> {
        let limit = AtomicU64::new(limit.unwrap_or(u64::MAX));
        Arc::new(Self { limit, used: AtomicU64::new(0), peak: AtomicU64::new(0), exceeded: AtomicBool::new(false) })
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Most bytes ever in use.
    pub fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    /// The limit, if there is one.
    pub fn limit(&self) -> Option<u64> {
        Some(self.limit.load(Ordering::Acquire)).filter(|limit| *limit < u64::MAX)
    }

    /// From now on guests may use so much, all together.
    ///
    /// # Errors
    /// The bytes in use, if they are more; the limit stays as it was.
    pub fn set_limit(&self, limit: Option<u64>) -> Result<(), u64> {
        let limit = limit.unwrap_or(u64::MAX);
        let before = self.limit.swap(limit, Ordering::AcqRel);
        // Whoever takes memory from here on sees the new limit, so this cannot become untrue.
        let used = self.used();
        if used <= limit {
            return Ok(());
        }
        self.limit.store(before, Ordering::Release);
        Err(used)
    }

    /// Whether a guest was refused memory.
    pub fn exceeded(&self) -> bool {
        self.exceeded.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: u64) -> Result<(), OutOfMemory> {
        let limit = self.limit.load(Ordering::Acquire);
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= limit);
        match self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits) {
            Ok(before) => {
                if before + bytes > self.peak() {
                    self.peak.fetch_max(before + bytes, Ordering::Relaxed);
                }
                Ok(())
            }
            Err(used) => {
                self.exceeded.store(true, Ordering::Relaxed);
                Err(OutOfMemory { wanted: bytes, used, limit })
            }
        }
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
    }
}

/// One store's share of its container's [`Budget`], given back when the store goes.
#[derive(Debug)]
pub struct Meter {
    budget: Arc<Budget>,
    taken: u64,
    /// What the growth under way took, to be returned should it fail.
    growing: u64,
}

impl Meter {
    /// An empty share.
    pub fn new(budget: Arc<Budget>) -> Self {
        Self { budget, taken: 0, growing: 0 }
    }

    fn grow(&mut self, bytes: u64, beyond_maximum: bool) -> Result<bool> {
        if beyond_maximum {
            self.growing = 0;
            return Ok(false);
        }
        self.budget.take(bytes)?;
        self.taken += bytes;
        self.growing = bytes;
        Ok(true)
    }

    fn undo(&mut self) {
        let bytes = std::mem::take(&mut self.growing);
        self.taken -= bytes;
        self.budget.give_back(bytes);
    }
}

impl ResourceLimiter for Meter {
    fn memory_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> Result<bool> {
        self.grow((desired - current) as u64, maximum.is_some_and(|maximum| desired > maximum))
    }

    fn memory_grow_failed(&mut self, _error: wasmtime::Error) -> Result<()> {
        self.undo();
        Ok(())
    }

    fn table_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> Result<bool> {
        self.grow((desired - current) as u64 * TABLE_ELEMENT, maximum.is_some_and(|maximum| desired > maximum))
    }

    fn table_grow_failed(&mut self, _error: wasmtime::Error) -> Result<()> {
        self.undo();
        Ok(())
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.budget.give_back(self.taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stores_of_a_container_share_one_budget_and_return_it() {
        let budget = Budget::new(Some(100));
        let (mut one, mut two) = (Meter::new(budget.clone()), Meter::new(budget.clone()));
        assert!(one.memory_growing(0, 60, None).unwrap());
        assert!(two.memory_growing(0, 41, None).is_err());
        assert!(budget.exceeded());
        assert!(two.memory_growing(0, 40, None).unwrap());
        drop(one);
        assert_eq!((budget.used(), budget.peak()), (40, 100));
        drop(two);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_limit_may_change_but_not_below_what_is_used() {
        let budget = Budget::new(None);
        let mut meter = Meter::new(budget.clone());
        assert!(meter.memory_growing(0, 60, None).unwrap());
        assert_eq!((budget.set_limit(Some(59)), budget.limit()), (Err(60), None));
        assert_eq!((budget.set_limit(Some(60)), budget.limit()), (Ok(()), Some(60)));
        assert!(meter.memory_growing(60, 61, None).is_err());
        assert_eq!(budget.set_limit(Some(70)), Ok(()));
        assert!(meter.memory_growing(60, 70, None).unwrap());
        assert_eq!((budget.set_limit(None), budget.limit()), (Ok(()), None));
        assert!(meter.memory_growing(70, 700, None).unwrap());
    }

    #[test]
    fn a_growth_that_fails_takes_nothing() {
        let budget = Budget::new(None);
        let mut meter = Meter::new(budget.clone());
        assert!(meter.memory_growing(0, 10, None).unwrap());
        meter.memory_grow_failed(wasmtime::Error::msg("no address space")).unwrap();
        assert!(!meter.memory_growing(0, 10, Some(5)).unwrap());
        meter.memory_grow_failed(wasmtime::Error::msg("refused")).unwrap();
        assert!(meter.table_growing(0, 2, None).unwrap());
        assert_eq!(budget.used(), 16);
    }
}
