//! The anchor: one parked OS thread that has entered a pod's namespaces. Its thread id is the task's pid.
//!
//! `/proc/<tid>/ns/net` is the pod's network to containerd, to CNI, to `nsenter` and to native sidecars. The thread is a
//! name for namespaces and does nothing. It ends when its [`Anchor`] is dropped, whoever still holds a [`Network`]. Only
//! the table of pods makes one.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, gettid, move_into_link_name_space, unshare_unsafe};

use super::netns::NetNs;
use super::sockets::Network;
use crate::bundle::{Namespace, Namespaces};
use crate::error::{Error, Result};
use crate::host;

/// Enough to log; the kernel asks for 16 KiB at least, and only touched pages count.
const STACK: usize = 256 << 10;

/// A parked thread inside the namespaces of a pod.
#[derive(Debug)]
pub struct Anchor {
    tid: u32,
    /// None when it is the host's.
    network: Option<Arc<NetNs>>,
    /// Dropped to end the thread.
    end: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Anchor {
    /// Starts the thread and waits until it is inside: some hundred microseconds for a new network namespace. Blocks:
    /// not for an actor's thread.
    ///
    /// # Errors
    /// `Host` with the namespace that could not be entered or made; no thread is left.
    pub fn start(namespaces: &Namespaces, hostname: Option<&str>) -> Result<Self> {
        let (namespaces, hostname) = (namespaces.clone(), hostname.map(str::to_owned));
        let (ready, entered) = mpsc::sync_channel(1);
        let (end, ended) = mpsc::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("anchor".into())
            .stack_size(STACK)
            .spawn(move || {
                let result = enter(&namespaces, hostname.as_deref());
                let inside = result.is_ok();
                let tid = gettid().as_raw_nonzero().get().unsigned_abs();
                // Nobody listens only if the creator is gone, and then nobody needs the thread either.
                if ready.send(result.map(|network| (tid, network))).is_ok() && inside {
                    // Parks until the other end is dropped.
                    let _ended = ended.recv();
                }
            })
            .map_err(|e| Error::host("start the pod's anchor thread", e))?;
        match entered.recv() {
            Ok(Ok((tid, network))) => {
                Ok(Self { tid, network: network.map(Arc::new), end: Some(end), thread: Some(thread) })
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::Internal("the pod's anchor thread died".into())),
        }
    }

    /// The thread's id: the pid that containerd is told.
    pub fn tid(&self) -> u32 {
        self.tid
    }

    /// The pod's network, to make sockets in.
    pub fn network(&self) -> Network {
        self.network.as_ref().map_or_else(Network::host, Network::of)
    }
}

impl Drop for Anchor {
    /// Ends the thread and waits for it, so that "deleted" means gone (but for the moment that the kernel needs to take
    /// it out of `/proc`); it only has to wake up. Blocks shortly: drop it on a blocking thread.
    fn drop(&mut self) {
        drop(self.end.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(tid = self.tid, "an anchor thread panicked");
        }
    }
}

/// Enters or makes the namespaces; returns the network, unless it is the host's.
fn enter(namespaces: &Namespaces, hostname: Option<&str>) -> Result<Option<NetNs>> {
    use LinkNameSpaceType as Type;
    let mut fresh = UnshareFlags::empty();
    for (name, namespace, kind, flag) in [
        ("network", &namespaces.network, Type::Network, UnshareFlags::NEWNET),
        ("ipc", &namespaces.ipc, Type::InterProcessCommunication, UnshareFlags::NEWIPC),
        ("uts", &namespaces.uts, Type::HostNameAndNISDomainName, UnshareFlags::NEWUTS),
    ] {
        match namespace {
            Namespace::Host => {}
            Namespace::New => fresh |= flag,
            Namespace::Join(path) => join(name, path, kind)?,
        }
    }
    if !fresh.is_empty() {
        // SAFETY: the flags name namespaces only (never `CLONE_FILES`, `CLONE_FS` or `CLONE_VM`), so no memory or
        // descriptor table changes for this or any other thread; a thread may unshare these three for itself.
        unsafe { unshare_unsafe(fresh) }.map_err(|e| Error::host(format!("make new namespaces ({fresh:?})"), e))?;
    }
    // A hostname is set in a namespace of our own only, never on the host.
    if let Some(name) = hostname.filter(|_| namespaces.uts == Namespace::New) {
        rustix::system::sethostname(name.as_bytes())
            .map_err(|e| Error::host(format!("set the hostname to {name:?}"), e))?;
    }
    let network = (namespaces.network != Namespace::Host).then(NetNs::of_this_thread);
    network.transpose().map_err(|e| Error::host("open the pod's network namespace", e))
}

fn join(name: &str, path: &Path, kind: LinkNameSpaceType) -> Result<()> {
    let what = || format!("enter the {name} namespace {}", path.display());
    let fd = host::open_file(path).map_err(|e| Error::host(what(), e))?;
    move_into_link_name_space(rustix::fd::AsFd::as_fd(&fd), Some(kind)).map_err(|e| Error::host(what(), e))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::pod) fn exists(tid: u32) -> bool {
        Path::new(&format!("/proc/self/task/{tid}")).exists()
    }

    /// The kernel wakes who joins a thread a moment before it takes the thread out of `/proc`.
    pub(in crate::pod) fn await_end(tid: u32) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while exists(tid) {
            assert!(std::time::Instant::now() < deadline, "thread {tid} is still there");
            std::thread::yield_now();
        }
    }

    #[test]
    fn an_anchor_on_the_host_has_a_tid_and_ends_with_its_owner() {
        let anchor = Anchor::start(&Namespaces::default(), None).unwrap();
        let tid = anchor.tid();
        assert!(exists(tid));
        drop(anchor);
        await_end(tid);
    }

    #[test]
    fn a_missing_namespace_is_named() {
        let namespaces = Namespaces { network: Namespace::Join("/nonexistent/ns".into()), ..Default::default() };
        let error = Anchor::start(&namespaces, None).unwrap_err().to_string();
        assert!(error.contains("network namespace /nonexistent/ns"), "{error}");
    }
}
