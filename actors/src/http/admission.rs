//! Who may run a request now.
//!
//! The process has [`INSTANCES`] slots. A container may hold as many as are free for everybody else, up to its own limit:
//! one that holds half of them gets no more, a second one then half of the rest, and a container that holds none is let in
//! while there is a single one. So nobody starves, and nothing is set aside for those who do not come.
//!
//! Pure but for its counters. Asked by `request.rs` before anything is made.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::guest::INSTANCES;

/// The slots of the process.
#[derive(Debug)]
pub struct Slots {
    total: usize,
    used: AtomicUsize,
}

impl Default for Slots {
    fn default() -> Self {
        Self { total: INSTANCES as usize, used: AtomicUsize::new(0) }
    }
}

/// One container's door to them.
#[derive(Debug)]
pub struct Admission {
    slots: Arc<Slots>,
    limit: usize,
    used: AtomicUsize,
}

/// A slot taken; given back when dropped.
#[derive(Debug)]
pub struct Permit(Arc<Admission>);

impl Admission {
    /// `limit` requests at once at most.
    pub fn new(slots: Arc<Slots>, limit: usize) -> Arc<Self> {
        Arc::new(Self { slots, limit, used: AtomicUsize::new(0) })
    }

    /// A slot, if this container may have one now.
    pub fn admit(self: &Arc<Self>) -> Option<Permit> {
        let mine = self.used.fetch_add(1, Ordering::Relaxed);
        let all = self.slots.used.fetch_add(1, Ordering::Relaxed);
        // From here on the counters are right whatever is decided.
        let permit = Permit(Arc::clone(self));
        let free = self.slots.total.saturating_sub(all);
        (mine < self.limit && mine < free).then_some(permit)
    }

    /// Requests that run now.
    pub fn running(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// The most that can.
    pub fn limit(&self) -> usize {
        self.limit
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::Relaxed);
        self.0.slots.used.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(total: usize) -> Arc<Slots> {
        Arc::new(Slots { total, used: AtomicUsize::new(0) })
    }

    fn take_all(admission: &Arc<Admission>) -> Vec<Permit> {
        std::iter::from_fn(|| admission.admit()).collect()
    }

    #[test]
    fn a_greedy_container_leaves_room_for_others() {
        let slots = slots(100);
        let (one, two) = (Admission::new(slots.clone(), 1000), Admission::new(slots.clone(), 1000));
        let held = take_all(&one);
        assert_eq!(held.len(), 50);
        let more = take_all(&two);
        assert_eq!(more.len(), 25);
        drop(held);
        assert_eq!(one.running(), 0);
        assert_eq!(take_all(&two).len(), 25);
        drop(more);
        assert_eq!(slots.used.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn whoever_holds_nothing_is_let_in_while_there_is_a_slot() {
        let slots = slots(100);
        let greedy: Vec<_> = (0..5).map(|_| Admission::new(slots.clone(), 1000)).collect();
        let held: Vec<_> = greedy.iter().map(take_all).collect();
        assert!(slots.used.load(Ordering::Relaxed) < 100);
        assert!(Admission::new(slots, 1).admit().is_some());
        drop(held);
    }

    #[test]
    fn a_limit_is_kept() {
        let admission = Admission::new(slots(100), 3);
        assert_eq!(take_all(&admission).len(), 3);
        assert!(admission.admit().is_some());
    }
}
