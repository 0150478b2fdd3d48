//! Instances that wait for their next request (`INSTANCE_REUSE`).
//!
//! Invariant: they never use the slots that requests run in; see `pool`. Called by `serving.rs`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use wasmtime::{Engine, Store};
use wasmtime_wasi_http::p2::bindings::Proxy;

use super::pool::IDLE_INSTANCES;
use super::visitor::Visitor;

/// An instance of a server of WASI 0.2.
pub(super) struct Instance {
    pub store: Store<Visitor>,
    pub proxy: Proxy,
    /// Requests so far.
    pub served: u32,
    /// Idle since then.
    idle: Option<(Instant, IdleSlot)>,
}

impl Instance {
    /// One that served nobody yet.
    pub fn new(store: Store<Visitor>, proxy: Proxy) -> Self {
        Self { store, proxy, served: 0, idle: None }
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
    /// By the thread that served with them last: its core has their memory in its caches. The last one back is the first one
    /// out, so those that nobody needs grow old.
    instances: Mutex<HashMap<ThreadId, Vec<Instance>>>,
}

impl Warm {
    /// `reuse` requests for each instance, if the next comes within `idle`.
    pub fn new(reuse: u32, idle: Duration) -> Self {
        Self { reuse, idle, instances: Mutex::default() }
    }

    /// One for a request on this engine: this thread's own, else any.
    pub fn take(&self, engine: &Engine) -> Option<Instance> {
        if self.reuse < 2 {
            return None;
        }
        let mut instance = {
            let mut instances = self.lock();
            let own = instances.get_mut(&thread::current().id()).and_then(Vec::pop);
            own.or_else(|| instances.values_mut().find_map(Vec::pop))?
        };
        instance.idle = None;
        Engine::same(instance.store.engine(), engine).then_some(instance)
    }

    /// Keeps one for its next request, if it may have one.
    pub fn keep(&self, mut instance: Instance) {
        if instance.served < self.reuse
            && let Some(slot) = IdleSlot::take()
        {
            instance.idle = Some((Instant::now(), slot));
            self.lock().entry(thread::current().id()).or_default().push(instance);
        }
    }

    /// Drops those that nobody came for.
    pub fn cool_down(&self) {
        let now = Instant::now();
        let is_old = |instance: &Instance| instance.idle.as_ref().is_some_and(|(since, _)| now - *since >= self.idle);
        // Dropped after the lock.
        let mut old = Vec::new();
        self.lock().retain(|_, instances| {
            // The oldest are at the bottom.
            let count = instances.iter().take_while(|instance| is_old(instance)).count();
            old.extend(instances.drain(..count));
            !instances.is_empty()
        });
        drop(old);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ThreadId, Vec<Instance>>> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
