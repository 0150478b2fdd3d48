//! Keeping the cache folder within its limit and free of what dead processes left.
//!
//! ```text
//!   after a store:  list ─▶ more than the limit? unlink the longest unused, as many as needed
//!                        └▶ lock files and temporary files that nobody holds: unlink
//! ```
//! The last use of an entry is its file's modification time, set at every use: its contents never change, and access
//! times are the mount's to decide. Nothing here needs a lock of its own: two processes that tidy at once find the same
//! oldest entries, and unlinking twice is unlinking once. What is being written has no entry's name; what is mapped
//! loses its name only, and its pages when the last guest that runs it ends.
//!
//! Called by `cache.rs` alone.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use tracing::{debug, info};

use super::cache::TEMPORARY;
use super::turn::{self, Turn};

/// A file that holds code.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// Seconds and nanoseconds.
    used: (i64, i64),
    name: String,
    bytes: u64,
}

/// Remembers that the entry is used now. Best effort: on a read-only disk nothing is evicted either.
pub(super) fn touch(dir: impl AsFd, name: &str) {
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
    };
    let _ = rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW);
}

/// Brings the folder below `limit` bytes and clears it of leftovers. The entry `newest` stays.
pub(super) fn tidy(dir: &OwnedFd, limit: u64, newest: &str) -> io::Result<()> {
    let (entries, leftovers) = list(dir)?;
    for name in leftovers {
        sweep(dir, &name);
    }
    let (mut count, mut bytes) = (0, 0);
    for entry in excess(entries, limit, newest) {
        if rustix::fs::unlinkat(dir, &*entry.name, AtFlags::empty()).is_ok() {
            debug!(key = entry.name, bytes = entry.bytes, "evicted");
            (count, bytes) = (count + 1, bytes + entry.bytes);
        }
    }
    if count > 0 {
        info!(entries = count, bytes, limit, "evicted the longest unused entries of the cache");
    }
    Ok(())
}

/// The entries, and the names of files that may be leftovers. What is neither is somebody else's and stays.
fn list(dir: &OwnedFd) -> io::Result<(Vec<Entry>, Vec<String>)> {
    let (mut entries, mut leftovers) = (Vec::new(), Vec::new());
    for found in rustix::fs::Dir::read_from(dir)? {
        let Ok(name) = found?.file_name().to_str().map(str::to_owned) else { continue };
        if name.starts_with(turn::PREFIX) || name.starts_with(TEMPORARY) {
            leftovers.push(name);
        } else if name.len() == 64 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            // Gone since: another process tidies as well.
            let Ok(stat) = rustix::fs::statat(dir, &*name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
                let used = (stat.st_mtime, stat.st_mtime_nsec as i64);
                entries.push(Entry { used, name, bytes: u64::try_from(stat.st_size).unwrap_or_default() });
            }
        }
    }
    Ok((entries, leftovers))
}

/// What has to go for the rest to fit: the longest unused first, and no more than needed.
fn excess(mut entries: Vec<Entry>, limit: u64, newest: &str) -> Vec<Entry> {
    let mut total: u64 = entries.iter().map(|entry| entry.bytes).sum();
    entries.retain(|entry| entry.name != newest);
    entries.sort_by(|one, other| (one.used, &one.name).cmp(&(other.used, &other.name)));
    let goes = |entry: &Entry| {
        let goes = total > limit;
        total = total.saturating_sub(if goes { entry.bytes } else { 0 });
        goes
    };
    let mut goes = goes;
    entries.into_iter().take_while(|entry| goes(entry)).collect()
}

/// Removes a lock file or a temporary file unless its process lives, which then holds a lock on it.
fn sweep(dir: &OwnedFd, name: &str) {
    if name.starts_with(turn::PREFIX) {
        // Taken and given back: that removes the file.
        drop(Turn::take_file(dir, name.to_owned()));
        return;
    }
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let open = rustix::fs::openat(dir, name, flags, Mode::empty());
    let dead = open.is_ok_and(|fd| rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive).is_ok());
    if dead && rustix::fs::unlinkat(dir, name, AtFlags::empty()).is_ok() {
        debug!(name, "removed what a dead process left in the cache");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn entries(sizes: &[(i64, u64)]) -> Vec<Entry> {
        let entry = |(number, (used, bytes)): (usize, &(i64, u64))| Entry {
            used: (*used, 0),
            name: number.to_string(),
            bytes: *bytes,
        };
        sizes.iter().enumerate().map(entry).collect()
    }

    #[test]
    fn the_longest_unused_go_first_and_no_more_than_needed() {
        let all = entries(&[(30, 10), (10, 10), (20, 10), (40, 10)]);
        let gone = |limit| excess(all.clone(), limit, "3").into_iter().map(|entry| entry.name).collect::<Vec<_>>();
        assert!(gone(40).is_empty());
        assert_eq!(gone(39), ["1"]);
        assert_eq!(gone(20), ["1", "2"]);
        assert_eq!(gone(0), ["1", "2", "0"]);
    }

    proptest! {
        #[test]
        fn what_stays_fits_and_was_used_later(
            sizes in proptest::collection::vec((0..50_i64, 0..1000_u64), 1..40),
            limit in 0..20_000_u64,
        ) {
            let all = entries(&sizes);
            let gone = excess(all.clone(), limit, "0");
            let names: BTreeSet<_> = gone.iter().map(|entry| entry.name.clone()).collect();
            let stays: Vec<_> = all.iter().filter(|entry| !names.contains(&entry.name)).collect();
            let total: u64 = stays.iter().map(|entry| entry.bytes).sum();
            prop_assert!(total <= limit || stays.iter().all(|entry| entry.name == "0"));
            prop_assert!(stays.iter().any(|entry| entry.name == "0"), "the newest stays");
            for last in &gone {
                prop_assert!(stays.iter().all(|entry| entry.name == "0" || entry.used >= last.used));
            }
            if let Some(last) = gone.last() {
                prop_assert!(total + last.bytes > limit, "one less would have done");
            }
        }
    }
}
