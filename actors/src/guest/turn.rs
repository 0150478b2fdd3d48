//! Taking turns with the other processes that use the same cache folder: one lock file a turn.
//!
//! ```text
//!   open or make ─▶ lock ─▶ still the file of that name? ─▶ ours ─▶ remove the name, unlock
//!        ▲            │ taken: try again later   │ no: its holder has just removed it
//!        └────────────┴──────────────────────────┘
//! ```
//! Invariants. At most one process holds a turn; the kernel takes it from a process that dies. A lock file lies in the
//! folder only while somebody holds or is about to hold its turn; what a killed process leaves is swept (`tidy.rs`).
//! A turn spares work and nothing else: whoever cannot have one (a full or read-only disk, a file system without locks,
//! a holder that does not get on) goes on without.
//!
//! Called by `workshop.rs` through `cache.rs`, on blocking threads.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

/// How the lock files are called, before what the turn is for.
pub(super) const PREFIX: &str = ".turn-";

/// A turn that is held. Dropped, it is the next one's.
pub(super) struct Turn {
    dir: OwnedFd,
    name: String,
    /// Unlocked when it is closed: after the name is gone.
    _lock: OwnedFd,
}

impl Turn {
    /// Takes the turn for `what` if nobody has it. Does not wait.
    pub fn take(dir: impl AsFd, what: &str) -> io::Result<Option<Self>> {
        Self::take_file(dir, format!("{PREFIX}{what}"))
    }

    /// The same, by the name of the lock file.
    pub(super) fn take_file(dir: impl AsFd, name: String) -> io::Result<Option<Self>> {
        let dir = dir.as_fd().try_clone_to_owned()?;
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        loop {
            let lock = rustix::fs::openat(&dir, &*name, flags, Mode::RUSR | Mode::WUSR)?;
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            if is_named(&dir, &name, &lock)? {
                return Ok(Some(Self { dir, name, _lock: lock }));
            }
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // Best effort: a file that stays is taken by the next one, or swept.
        let _ = rustix::fs::unlinkat(&self.dir, &*self.name, AtFlags::empty());
    }
}

/// Whether the open file is the one that has this name now.
pub(super) fn is_named(dir: impl AsFd, name: &str, file: impl AsFd) -> io::Result<bool> {
    let ours = rustix::fs::fstat(file)?;
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(theirs) => Ok((ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn names(folder: &tempfile::TempDir) -> usize {
        std::fs::read_dir(folder.path()).unwrap().count()
    }

    #[test]
    fn a_turn_is_one_holders_and_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let dir = File::open(folder.path()).unwrap();
        let turn = Turn::take(&dir, "a").unwrap().unwrap();
        assert!(Turn::take(&dir, "a").unwrap().is_none());
        assert!(Turn::take(&dir, "b").unwrap().is_some());
        assert_eq!(names(&folder), 1);
        drop(turn);
        assert_eq!(names(&folder), 0);
        assert!(Turn::take(&dir, "a").unwrap().is_some());
    }

    #[test]
    fn the_file_of_a_dead_holder_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(".turn-a"), "").unwrap();
        let dir = File::open(folder.path()).unwrap();
        assert!(Turn::take(&dir, "a").unwrap().is_some());
        assert_eq!(names(&folder), 0);
    }

    /// The dangerous moment is between a holder's removal of the name and another's lock on the file that had it.
    #[test]
    fn never_two_at_once_however_they_race() {
        let folder = tempfile::tempdir().unwrap();
        let dir = Arc::new(File::open(folder.path()).unwrap());
        let inside = Arc::new(AtomicUsize::new(0));
        let racers: Vec<_> = (0..4)
            .map(|_| {
                let (dir, inside) = (dir.clone(), inside.clone());
                std::thread::spawn(move || {
                    let mut had = 0;
                    while had < 500 {
                        let Some(turn) = Turn::take(&dir, "a").unwrap() else { continue };
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        had += 1;
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(turn);
                    }
                })
            })
            .collect();
        racers.into_iter().for_each(|racer| racer.join().unwrap());
        assert_eq!(names(&folder), 0);
    }

    #[test]
    fn a_folder_that_takes_no_file_is_an_error_not_a_wait() {
        let dir = File::open("/proc/self").unwrap();
        assert!(Turn::take(&dir, "a").is_err());
    }
}
