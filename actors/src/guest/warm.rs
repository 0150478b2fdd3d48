//! Instances that wait for their next request (`INSTANCE_REUSE`).
//!
//! Invariant: they never use the slots that requests run in; see `pool`. Called by `serving.rs`.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use wasmtime::{Engine, Store};
use wasmtime_wasi_http::p2::bindings::Proxy;

use super::pool::IDLE_INSTANCES;
use super::visitor::Visitor;
use crate::sharded::Sharded;

/// An instance of a server of WASI 0.2.
pub(super) struct Instance {
    pub store: Store<Visitor>,
    pub proxy: Proxy,
    /// Requests so far.
    pub served: u32,
    /// Idle since then; of no meaning while it serves.
    idle: Instant,
    /// Kept from its first wait on: instances that have one are never more than such slots.
    slot: Option<IdleSlot>,
}

impl Instance {
    /// One that served nobody yet.
    pub fn new(store: Store<Visitor>, proxy: Proxy) -> Self {
        Self { store, proxy, served: 0, idle: Instant::now(), slot: None }
    }
}

/// One of the slots of the pool that are for idle instances.
struct IdleSlot;

static IDLE: AtomicU32 = AtomicU32::new(0);

impl IdleSlot {
    fn take() -> Option<Self> {
        let slot = (IDLE.fetch_add(1, Ordering::Relaxed) < IDLE_INSTANCES).then_some(Self);
        if slot.is_none() {
            IDLE.fetch_sub(1, Ordering::Relaxed);
        }
        slot
    }
}

impl Drop for IdleSlot {
    fn drop(&mut self) {
        IDLE.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The instances of one container between two requests.
pub(super) struct Warm {
    reuse: u32,
    idle: Duration,
    /// Where the thread that served with them last will look first: its core has their memory in its caches. The last one
    /// back is the first one out, so those that nobody needs grow old. None where none is kept.
    instances: Option<Sharded<Mutex<Vec<Instance>>>>,
}

impl Warm {
    /// `reuse` requests for each instance, if the next comes within `idle`.
    pub fn new(reuse: u32, idle: Duration) -> Self {
        Self { reuse, idle, instances: (reuse > 1).then(Sharded::default) }
    }

    /// One for a request on this engine: this thread's own, else any.
    pub fn take(&self, engine: &Engine) -> Option<Instance> {
        let instance = self.instances.as_ref()?.all().find_map(|instances| lock(instances).pop())?;
        Engine::same(instance.store.engine(), engine).then_some(instance)
    }

    /// Keeps one for its next request, if it may have one.
    pub fn keep(&self, mut instance: Instance) {
        let Some(instances) = self.instances.as_ref().filter(|_| instance.served < self.reuse) else { return };
        instance.slot = instance.slot.take().or_else(IdleSlot::take);
        if instance.slot.is_some() {
            instance.idle = Instant::now();
            lock(instances.mine()).push(instance);
        }
    }

    /// Drops those that nobody came for.
    pub fn cool_down(&self) {
        let now = Instant::now();
        for instances in self.instances.iter().flat_map(Sharded::all) {
            let old: Vec<_> = {
                let mut instances = lock(instances);
                // The oldest are at the bottom.
                let count = instances.iter().take_while(|instance| now - instance.idle >= self.idle).count();
                instances.drain(..count).collect()
            };
            // Not under the lock.
            drop(old);
        }
    }
}

fn lock(instances: &Mutex<Vec<Instance>>) -> MutexGuard<'_, Vec<Instance>> {
    instances.lock().unwrap_or_else(PoisonError::into_inner)
}
