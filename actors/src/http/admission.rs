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

impl Admission {
    /// `limit` requests at once at most.
    pub fn new(slots: Arc<Slots>, limit: usize) -> Self {
        Self { slots, limit, used: AtomicUsize::new(0) }
    }

    /// Takes a slot, if this container may have one now; to be given back by [`leave`](Self::leave).
    pub fn enter(&self) -> bool {
        let mine = self.used.fetch_add(1, Ordering::Relaxed);
        let all = self.slots.used.fetch_add(1, Ordering::Relaxed);
        let free = self.slots.total.saturating_sub(all);
        let may = mine < self.limit && mine < free;
        if !may {
            self.leave();
        }
        may
    }

    /// Gives a slot back.
    pub fn leave(&self) {
        self.used.fetch_sub(1, Ordering::Relaxed);
        self.slots.used.fetch_sub(1, Ordering::Relaxed);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(total: usize) -> Arc<Slots> {
        Arc::new(Slots { total, used: AtomicUsize::new(0) })
    }

    fn take_all(admission: &Admission) -> usize {
        std::iter::repeat_with(|| admission.enter()).take_while(|entered| *entered).count()
    }

    #[test]
    fn a_greedy_container_leaves_room_for_others() {
        let slots = slots(100);
        let (one, two) = (Admission::new(slots.clone(), 1000), Admission::new(slots.clone(), 1000));
        assert_eq!((take_all(&one), take_all(&two)), (50, 25));
        (0..50).for_each(|_| one.leave());
        assert_eq!(one.running(), 0);
        assert_eq!(take_all(&two), 25);
        (0..50).for_each(|_| two.leave());
        assert_eq!(slots.used.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn whoever_holds_nothing_is_let_in_while_there_is_a_slot() {
        let slots = slots(100);
        for _ in 0..5 {
            take_all(&Admission::new(slots.clone(), 1000));
        }
        assert!(slots.used.load(Ordering::Relaxed) < 100);
        assert!(Admission::new(slots, 1).enter());
    }

    #[test]
    fn a_limit_is_kept() {
        let admission = Admission::new(slots(100), 3);
        assert_eq!(take_all(&admission), 3);
        admission.leave();
        assert!(admission.enter());
    }
}
