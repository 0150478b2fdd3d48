//! The end of a FIFO: what is in it is kept only while somebody has it open.
//!
//! containerd's clients open their end on a thread of their own, and on a busy machine a guest that only says hello is
//! gone before that thread ran. Closing our ends then would throw its words away. And a client that hears of the exit may
//! leave with what it has read by then, so it is not told before it has read everything. Called by [`super::Streams`].

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};

/// How long a reader may take for what is left. One that has gone for good delays the exit this much, if anything is unread.
const PATIENCE: Duration = Duration::from_secs(1);
/// The kernel tells nobody that a pipe is empty.
const PAUSE: Duration = Duration::from_millis(1);

/// Closes both ends of a FIFO once nothing is in it; after a second in any case.
pub(super) async fn hand_over(both_ends: OwnedFd) {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let path = format!("/proc/self/fd/{}", both_ends.as_raw_fd());
    let Ok(writer) = open(path, flags, Mode::empty()) else { return };
    // Both were ours to the end; what is left belongs to the reader.
    drop(both_ends);
    let read = async {
        while is_unread(&writer) {
            tokio::time::sleep(PAUSE).await;
        }
    };
    if tokio::time::timeout(PATIENCE, read).await.is_err() {
        tracing::debug!("output was left in a FIFO that nobody reads");
    }
}

fn is_unread(pipe: &OwnedFd) -> bool {
    rustix::io::ioctl_fionread(pipe).is_ok_and(|bytes| bytes > 0)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::time::Instant;

    use rustix::fs::{CWD, FileType, mknodat};

    use super::*;

    #[tokio::test]
    async fn a_reader_that_comes_late_finds_everything() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let ours = open(&path, OFlags::RDWR | OFlags::NONBLOCK, Mode::empty()).unwrap();
        rustix::io::write(&ours, b"hello").unwrap();
        let reader = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            let mut text = String::new();
            std::fs::File::open(path).unwrap().read_to_string(&mut text).unwrap();
            text
        });
        hand_over(ours).await;
        assert_eq!(reader.join().unwrap(), "hello");
    }

    #[tokio::test]
    async fn nobody_waits_for_a_reader_of_nothing_nor_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let open = || open(&path, OFlags::RDWR | OFlags::NONBLOCK, Mode::empty()).unwrap();
        let began = Instant::now();
        hand_over(open()).await;
        assert!(began.elapsed() < PATIENCE / 2);
        let ours = open();
        rustix::io::write(&ours, b"hello").unwrap();
        hand_over(ours).await;
        assert!(began.elapsed() >= PATIENCE);
    }
}
