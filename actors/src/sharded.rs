//! What every request changes and hardly anybody reads: each core's thread has a piece of its own.
//!
//! Two cores that write to one cache line take it from each other, again and again. So the pieces lie apart, and who wants
//! the whole looks at all of them.

use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crossbeam_utils::CachePadded;

/// More pieces than this are not worth their memory.
const MOST: usize = 16;

/// For threads that nobody has given a number.
static NEXT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static NUMBER: Cell<usize> = Cell::new(NEXT.fetch_add(1, Ordering::Relaxed));
}

/// Numbers this thread: those that run side by side should have different numbers.
pub fn number_this_thread(number: usize) {
    NUMBER.set(number);
}

/// How many threads can run at once. Asked of the system once: it looks into files.
pub fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// A piece for each core.
#[derive(Debug)]
pub struct Sharded<T>(Box<[CachePadded<T>]>);

impl<T: Default> Default for Sharded<T> {
    fn default() -> Self {
        Self((0..cores().min(MOST)).map(|_| CachePadded::default()).collect())
    }
}

impl<T> Sharded<T> {
    /// This thread's piece, which others may share.
    pub fn mine(&self) -> &T {
        &self.0[NUMBER.get() % self.0.len()]
    }

    /// All pieces, this thread's first.
    pub fn all(&self) -> impl Iterator<Item = &T> {
        let mine = NUMBER.get() % self.0.len();
        self.0.iter().cycle().skip(mine).take(self.0.len()).map(|piece| &**piece)
    }
}

/// A number that all cores count in.
#[derive(Debug, Default)]
pub struct Counter(Sharded<AtomicU64>);

impl Counter {
    /// Whatever this thread does next, others see after this.
    pub fn add(&self, number: u64) {
        self.0.mine().fetch_add(number, Ordering::SeqCst);
    }

    /// Takes away what was added, by whichever thread.
    pub fn sub(&self, number: u64) {
        self.0.mine().fetch_sub(number, Ordering::SeqCst);
    }

    /// The sum. Exact once those who add have come to rest.
    pub fn total(&self) -> u64 {
        self.0.all().map(|piece| piece.load(Ordering::SeqCst)).fold(0, u64::wrapping_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_add_up() {
        let counter = Counter::default();
        std::thread::scope(|scope| {
            for number in 0..20 {
                let counter = &counter;
                scope.spawn(move || {
                    number_this_thread(number);
                    (0..1000).for_each(|_| counter.add(3));
                });
            }
        });
        counter.sub(60_000 - 7);
        assert_eq!(counter.total(), 7);
    }

    #[test]
    fn a_thread_sees_its_own_piece_first() {
        let pieces = Sharded::<AtomicU64>::default();
        number_this_thread(usize::MAX);
        pieces.mine().store(5, Ordering::Relaxed);
        let seen: Vec<_> = pieces.all().map(|piece| piece.load(Ordering::Relaxed)).collect();
        assert_eq!((seen.first(), seen.iter().sum()), (Some(&5), 5_u64));
    }
}
