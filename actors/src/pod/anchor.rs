//! The anchor: one parked OS thread that has entered a pod's namespaces. Its thread id is the task's pid.
//!
//! `/proc/<tid>/ns/net` is the pod's network to containerd, to CNI, to `nsenter` and to native sidecars. The thread is a
//! name for namespaces, and the place where sockets of the pod's network are made (see [`Network`]): it wakes up for a
//! few system calls and parks again. It ends when its [`Anchor`] is dropped, whoever still holds a [`Door`] to it. Only the
//! container's preparation makes one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;

use rustix::fs::{Mode, OFlags, open};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, gettid, move_into_link_name_space, unshare_unsafe};
use tokio::sync::oneshot;

use super::sockets::Network;
use crate::bundle::{Namespace, Namespaces};
use crate::error::{Error, Result};

/// Enough to make a socket and to log; the kernel asks for 16 KiB at least, and only touched pages count.
const STACK: usize = 256 << 10;

/// A parked thread inside the namespaces of a pod.
#[derive(Debug)]
pub struct Anchor {
    tid: u32,
    door: Door,
    /// The network is the host's: nobody needs the thread to make sockets.
    on_host: bool,
    thread: Option<JoinHandle<()>>,
}

/// Something to do inside the namespaces: some system calls that do not block.
type Job = Box<dyn FnOnce() + Send>;

/// What wakes the thread up.
enum Order {
    Run(Job),
    End,
}

/// A way into the namespaces of a pod. It does not keep them: after the [`Anchor`] is gone it leads nowhere.
#[derive(Debug, Clone)]
pub(super) struct Door(mpsc::Sender<Order>);

impl Door {
    /// Runs `job` on the anchor's thread. It must not block: the whole pod waits.
    ///
    /// # Errors
    /// `NotConnected` when the pod is gone.
    pub(super) async fn run<T, F>(&self, job: F) -> std::io::Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let gone = || std::io::Error::new(std::io::ErrorKind::NotConnected, "the pod is gone");
        let (answer, answered) = oneshot::channel();
        let job = Box::new(move || {
            // An error means that the caller has left; what the job made is closed by the drop.
            drop(answer.send(job()));
        });
        self.0.send(Order::Run(job)).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())
    }
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
        let on_host = namespaces.network == Namespace::Host;
        let (door, orders) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("anchor".into())
            .stack_size(STACK)
            .spawn(move || {
                let result = enter(&namespaces, hostname.as_deref());
                let inside = result.is_ok();
                let tid = gettid().as_raw_nonzero().get().unsigned_abs();
                // Nobody listens only if the creator is gone, and then nobody gives orders either.
                if ready.send(result.map(|()| tid)).is_ok() && inside {
                    obey(&orders);
                }
            })
            .map_err(|e| Error::host("start the pod's anchor thread", e))?;
        match entered.recv() {
            Ok(Ok(tid)) => Ok(Self { tid, door: Door(door), on_host, thread: Some(thread) }),
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
        if self.on_host { Network::host() } else { Network::behind(self.door.clone()) }
    }
}

impl Drop for Anchor {
    /// Ends the thread and waits for it, so that "deleted" means gone; it only has to wake up. Blocks shortly: drop it
    /// on a blocking thread.
    fn drop(&mut self) {
        // An error means that the thread has ended already.
        drop(self.door.0.send(Order::End));
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(tid = self.tid, "an anchor thread panicked");
        }
    }
}

/// Parks until there is something to do, until the end. A panic must not take the pod's namespaces away.
fn obey(orders: &mpsc::Receiver<Order>) {
    while let Ok(Order::Run(job)) = orders.recv() {
        if catch_unwind(AssertUnwindSafe(job)).is_err() {
            tracing::error!("a job on a pod's anchor thread panicked");
        }
    }
}

fn enter(namespaces: &Namespaces, hostname: Option<&str>) -> Result<()> {
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
    match hostname {
        Some(name) if namespaces.uts == Namespace::New => rustix::system::sethostname(name.as_bytes())
            .map_err(|e| Error::host(format!("set the hostname to {name:?}"), e)),
        _ => Ok(()),
    }
}

fn join(name: &str, path: &Path, kind: LinkNameSpaceType) -> Result<()> {
    let what = || format!("enter the {name} namespace {}", path.display());
    let fd = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|e| Error::host(what(), e))?;
    move_into_link_name_space(rustix::fd::AsFd::as_fd(&fd), Some(kind)).map_err(|e| Error::host(what(), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_anchor_on_the_host_has_a_tid_and_ends_with_its_owner() {
        let anchor = Anchor::start(&Namespaces::default(), None).unwrap();
        let task = format!("/proc/self/task/{}", anchor.tid());
        assert!(Path::new(&task).exists());
        drop(anchor);
        assert!(!Path::new(&task).exists());
    }

    #[tokio::test]
    async fn a_job_runs_on_the_thread_and_a_panic_in_one_harms_nobody() {
        let anchor = Anchor::start(&Namespaces::default(), None).unwrap();
        let tid = || gettid().as_raw_nonzero().get().unsigned_abs();
        assert_eq!(anchor.door.run(tid).await.unwrap(), anchor.tid());
        let panicked = anchor.door.run(|| panic!("on purpose")).await;
        assert!(panicked.is_err());
        assert_eq!(anchor.door.run(tid).await.unwrap(), anchor.tid());
    }

    #[tokio::test]
    async fn a_door_does_not_keep_the_thread() {
        let anchor = Anchor::start(&Namespaces::default(), None).unwrap();
        let (door, task) = (anchor.door.clone(), format!("/proc/self/task/{}", anchor.tid()));
        tokio::task::spawn_blocking(move || drop(anchor)).await.unwrap();
        assert!(!Path::new(&task).exists());
        assert_eq!(door.run(|| ()).await.unwrap_err().to_string(), "the pod is gone");
    }

    #[test]
    fn a_missing_namespace_is_named() {
        let namespaces = Namespaces { network: Namespace::Join("/nonexistent/ns".into()), ..Default::default() };
        let error = Anchor::start(&namespaces, None).unwrap_err().to_string();
        assert!(error.contains("network namespace /nonexistent/ns"), "{error}");
    }
}
