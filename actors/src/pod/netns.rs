//! A network namespace, and work inside it.
//!
//! A thread's network is its own business: a worker goes in, makes a socket and comes back before anything else runs on it.
//! That is two system calls, cheaper than asking another thread. A socket belongs for good to the network it was made in,
//! and any thread may poll it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags, open};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A network namespace, kept alive.
#[derive(Debug)]
pub(super) struct NetNs(OwnedFd);

/// Where every thread of ours returns to.
static HOME: OnceLock<NetNs> = OnceLock::new();

impl NetNs {
    /// The one that the calling thread is in.
    ///
    /// # Errors
    /// The kernel's refusal: no /proc.
    pub(super) fn of_this_thread() -> io::Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// Runs `job` with this network as the thread's own. It must not block or wait: whatever else the thread has to do
    /// would be done in here.
    ///
    /// # Errors
    /// The kernel's refusal to go in; `job` has not run then.
    pub(super) fn inside<T>(&self, job: impl FnOnce() -> T) -> io::Result<T> {
        let home = home()?;
        self.enter()?;
        let _back = Back(home);
        Ok(job())
    }

    fn open(path: &str) -> io::Result<Self> {
        Ok(Self(open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?))
    }

    fn enter(&self) -> io::Result<()> {
        Ok(move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))?)
    }
}

/// The process's own network: that of its first thread, which never leaves it.
fn home() -> io::Result<&'static NetNs> {
    match HOME.get() {
        Some(home) => Ok(home),
        None => {
            let home = NetNs::open("/proc/self/ns/net")?;
            Ok(HOME.get_or_init(|| home))
        }
    }
}

/// Returns, however the job ended.
struct Back(&'static NetNs);

impl Drop for Back {
    fn drop(&mut self) {
        if let Err(error) = self.0.enter() {
            // Others' sockets would be made in this pod's network from now on.
            tracing::error!(%error, "a thread cannot return from a pod's network");
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network() -> std::path::PathBuf {
        std::fs::read_link("/proc/thread-self/ns/net").unwrap()
    }

    #[test]
    fn a_thread_goes_in_and_comes_back_even_from_a_panic() {
        let before = network();
        let made = std::thread::spawn(|| {
            // SAFETY: only the network of this thread changes.
            let unshared = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
            unshared.map(|()| (NetNs::of_this_thread().unwrap(), network()))
        });
        // Making a network takes privileges.
        let Ok((other, its_name)) = made.join().unwrap() else { return };
        assert_eq!(other.inside(network).unwrap(), its_name);
        assert_eq!(network(), before);
        let panicked = std::panic::catch_unwind(|| other.inside(|| panic!("on purpose")));
        assert!(panicked.is_err());
        assert_eq!(network(), before);
    }
}
