//! Tells all connections of a server that a drain begins, or that it is over.
//!
//! A connection looks at the phase, one atomic number, whenever it is polled, and leaves its waker here once. A token to be
//! awaited would cost every poll of every connection a lock that they all share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;

/// Where a server is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Connections come and go.
    Serving,
    /// None may come; what is in flight is answered.
    Draining,
    /// Patience is over.
    Cut,
}

/// The bell of a server.
#[derive(Debug, Default)]
pub struct Bell {
    phase: AtomicU8,
    listeners: Mutex<Listeners>,
}

#[derive(Debug, Default)]
struct Listeners {
    next: u64,
    wakers: HashMap<u64, Waker>,
}

/// A connection that will be woken.
#[derive(Debug)]
pub struct Heard<'a> {
    bell: &'a Bell,
    number: u64,
}

impl Bell {
    /// The phase now.
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Serving,
            1 => Phase::Draining,
            _ => Phase::Cut,
        }
    }

    /// Enters a phase and wakes everybody. There is no way back.
    pub fn ring(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::AcqRel);
        self.lock().wakers.values().for_each(Waker::wake_by_ref);
    }

    /// Wakes `waker` at every ring, until the result is dropped.
    pub fn listen(&self, waker: Waker) -> Heard<'_> {
        let mut listeners = self.lock();
        let number = listeners.next;
        listeners.next += 1;
        listeners.wakers.insert(number, waker);
        Heard { bell: self, number }
    }

    fn lock(&self) -> MutexGuard<'_, Listeners> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Heard<'_> {
    fn drop(&mut self) {
        self.bell.lock().wakers.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_only_go_forward() {
        let bell = Bell::default();
        let heard = bell.listen(Waker::noop().clone());
        assert_eq!(bell.phase(), Phase::Serving);
        bell.ring(Phase::Cut);
        bell.ring(Phase::Draining);
        assert_eq!(bell.phase(), Phase::Cut);
        drop(heard);
        assert!(bell.lock().wakers.is_empty());
    }
}
