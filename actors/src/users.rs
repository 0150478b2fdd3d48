//! File operations of a guest, done as its container's user.
//!
//! ```text
//!   a guest's poll, on any thread ── spawn_blocking ──▶ threads of the process           root: the default, free
//!       └─ inside Identity::enter() ─ spawn_blocking ─▶ threads of that user              everybody else
//! ```
//! wasmtime-wasi hands whatever may touch a path to `spawn_blocking` of the runtime that is current. So a guest whose user
//! is not root is polled with another runtime as the current one, whose blocking threads have taken the user's ids, groups
//! and umask for themselves alone. To the kernel they are that user in all that is about files (fsuid, no capabilities),
//! and root to everybody who would send signals to the process or trace it.
//!
//! Invariants. A thread that was ever a user's runs nothing else. What a guest's poll starts beside (timers, tasks) lives
//! on the worker of that runtime, which stays root: threads inherit who starts them. Work of the process itself, for which
//! the user may lack rights, goes through [`at_home`].
//!
//! One runtime serves all containers of a user; it ends with the last of them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak, mpsc};
use std::task::{Context, Poll};

use rustix::fs::Mode;
use rustix::process::{Gid, umask};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, set_capabilities, set_thread_groups, unshare_unsafe,
};
use tokio::runtime::{Builder, EnterGuard, Handle, Runtime};

use crate::error::{Error, Result};

/// Of the process, and of a user whose spec says nothing.
const UMASK: u32 = 0o022;

/// As whom a container's files are accessed (config.md, POSIX-platform User).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups, sorted.
    pub groups: Vec<u32>,
    pub umask: u32,
}

impl User {
    /// The user that a spec names.
    pub fn new(uid: u32, gid: u32, groups: &[u32], umask: Option<u32>) -> Self {
        let mut groups = groups.to_owned();
        groups.sort_unstable();
        groups.dedup();
        Self { uid, gid, groups, umask: umask.map_or(UMASK, |mask| mask & 0o777) }
    }

    /// What every thread of the process is. Root passes every check that groups are about.
    fn is_ours(&self) -> bool {
        self.uid == 0 && self.gid == 0 && self.umask == UMASK
    }

    /// Makes the calling thread this user's, for ever.
    fn take(&self) -> io::Result<()> {
        // SAFETY: the thread gets a working directory, root and umask of its own, equal to those it had; no memory and no
        // descriptor table is separated.
        unsafe { unshare_unsafe(UnshareFlags::FS) }?;
        umask(Mode::from_raw_mode(self.umask));
        let groups: Vec<Gid> = self.groups.iter().map(|group| Gid::from_raw(*group)).collect();
        set_thread_groups(&groups)?;
        set_file_ids(self.uid, self.gid)?;
        if self.uid != 0 {
            // setfsuid has taken those about files; quotas and reserved blocks have others.
            let none = CapabilitySet::empty();
            set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
        }
        Ok(())
    }
}

/// Both calls change the calling thread alone and tell the id before, whether they did anything or not.
fn set_file_ids(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: neither call touches memory; the second of each changes nothing, as no id is -1.
    let now = unsafe {
        libc::setfsgid(gid);
        libc::setfsuid(uid);
        (libc::setfsuid(u32::MAX), libc::setfsgid(u32::MAX))
    };
    if now == (uid.cast_signed(), gid.cast_signed()) { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

/// Threads that are a user's.
pub struct Identity {
    /// Taken by the drop.
    runtime: Option<Runtime>,
}

/// By user; each ends with the last container that has it.
static IDENTITIES: Mutex<Option<HashMap<User, Weak<Identity>>>> = Mutex::new(None);

impl Identity {
    /// The identity of a user; none for the user that the process is anyway. Blocks shortly.
    ///
    /// # Errors
    /// `Host` when the kernel refuses to be that user, or there are no threads.
    pub fn of(user: &User) -> Result<Option<Arc<Self>>> {
        if user.is_ours() {
            return Ok(None);
        }
        let mut table = IDENTITIES.lock().unwrap_or_else(PoisonError::into_inner);
        let table = table.get_or_insert_default();
        if let Some(identity) = table.get(user).and_then(Weak::upgrade) {
            return Ok(Some(identity));
        }
        table.retain(|_, identity| identity.strong_count() > 0);
        let failed = |e| Error::host(format!("process.user: access files as uid {} gid {}", user.uid, user.gid), e);
        let identity = Arc::new(Self::start(user.clone()).map_err(failed)?);
        table.insert(user.clone(), Arc::downgrade(&identity));
        Ok(Some(identity))
    }

    fn start(user: User) -> io::Result<Self> {
        // On a thread that ends with it: what the kernel refuses is told now.
        let probe = user.clone();
        let probe = std::thread::Builder::new().name("user-probe".into()).spawn(move || probe.take())?;
        probe.join().map_err(|_| io::Error::other("a panic"))??;
        let (is_first, name) = (AtomicBool::new(true), format!("user-{}", user.uid));
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name(name)
            .enable_all()
            .on_thread_start(move || {
                if !is_first.swap(false, Ordering::AcqRel)
                    && let Err(error) = user.take()
                {
                    refuse(&user, &error);
                }
            })
            .build()?;
        // The worker is itself something that the first free thread takes up: nobody else may have anything to do before
        // it has, on the first thread.
        let (begun, worker) = mpsc::channel();
        drop(runtime.spawn(async move { begun.send(()).is_ok() }));
        worker.recv().map_err(io::Error::other)?;
        Ok(Self { runtime: Some(runtime) })
    }

    /// From here on, and until the guard is dropped, file operations that this thread begins are the user's.
    pub fn enter(&self) -> Option<Entered<'_>> {
        let runtime = self.runtime.as_ref()?;
        HOME.set(Handle::try_current().ok());
        Some(Entered { _guard: runtime.enter() })
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").finish_non_exhaustive()
    }
}

impl Drop for Identity {
    /// Without waiting: a thread may hang in the kernel.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The thread ends before it can run anything as somebody else. It was asked the same before, with success.
#[expect(clippy::panic, reason = "tokio offers no other way to end a thread that must not run")]
fn refuse(user: &User, error: &io::Error) {
    tracing::error!(user.uid, user.gid, %error, "a thread cannot access files as the user");
    panic!("a thread that is nobody's");
}

/// This thread works for a user's guest.
pub struct Entered<'a> {
    _guard: EnterGuard<'a>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        HOME.set(None);
    }
}

thread_local! {
    /// The runtime that was current before a guest's poll.
    static HOME: RefCell<Option<Handle>> = const { RefCell::new(None) };
}

/// The runtime for what a guest's poll leaves behind for the process to do; the current one outside of any.
pub fn home() -> Option<Handle> {
    HOME.with_borrow(Clone::clone).or_else(|| Handle::try_current().ok())
}

/// Has a future that a guest begins, but that is the process's own work, polled as if no user were entered.
pub fn at_home<F: Future>(future: F) -> AtHome<F> {
    AtHome { home: HOME.with_borrow(Clone::clone), future: Box::pin(future) }
}

/// See [`at_home`].
pub struct AtHome<F> {
    home: Option<Handle>,
    future: Pin<Box<F>>,
}

impl<F: Future> Future for AtHome<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let Self { home, future } = &mut *self;
        let _home = home.as_ref().map(Handle::enter);
        future.as_mut().poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::path::Path;

    use super::*;

    fn someone() -> User {
        User::new(1234, 2345, &[7, 5, 7], None)
    }

    /// What the kernel says of the calling thread: `Uid`, `Gid`, `Groups`, `CapEff`, `Umask`.
    fn status(field: &str) -> String {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("{field}:"))).unwrap();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    fn all_of_it() -> [String; 5] {
        ["Uid", "Gid", "Groups", "CapEff", "Umask"].map(status)
    }

    async fn as_user<T: Send + 'static>(identity: &Identity, work: impl FnOnce() -> T + Send + 'static) -> T {
        let task = {
            let _entered = identity.enter().unwrap();
            tokio::task::spawn_blocking(work)
        };
        task.await.unwrap()
    }

    #[test]
    fn root_is_what_the_process_is() {
        assert!(Identity::of(&User::new(0, 0, &[0, 1, 27], Some(0o022))).unwrap().is_none());
        assert!(!User::new(0, 0, &[], Some(0o027)).is_ours());
        assert!(!User::new(0, 5, &[], None).is_ours());
    }

    #[tokio::test]
    async fn the_threads_are_the_users_and_others_stay_what_they_are() {
        let before = all_of_it();
        let identity = Identity::of(&someone()).unwrap().unwrap();
        let [uid, gid, groups, capabilities, umask] = as_user(&identity, all_of_it).await;
        assert_eq!((&*uid, &*gid, &*groups), ("0 0 0 1234", "0 0 0 2345", "5 7"));
        assert_eq!((&*capabilities, &*umask), ("0000000000000000", "0022"));
        assert_eq!(all_of_it(), before);
        assert_eq!(tokio::task::spawn_blocking(all_of_it).await.unwrap(), before);
        // What was begun there goes on as the process itself, and so do the threads that it begins.
        let theirs = {
            let _entered = identity.enter().unwrap();
            tokio::spawn(async { (all_of_it(), std::thread::spawn(all_of_it).join().unwrap()) })
        };
        assert_eq!(theirs.await.unwrap(), (before.clone(), before));
    }

    #[tokio::test]
    async fn files_are_made_and_refused_as_the_users() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o777)).unwrap();
        let path = folder.path().to_owned();
        let secret = path.join("secret");
        std::fs::write(&secret, "").unwrap();
        std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).unwrap();
        let identity = Identity::of(&User::new(1234, 2345, &[], Some(0o077))).unwrap().unwrap();
        let error = as_user(&identity, move || std::fs::read(secret).unwrap_err().kind()).await;
        assert_eq!(error, io::ErrorKind::PermissionDenied);
        let new =
            as_user(&identity, move || std::fs::File::create(path.join("new")).unwrap().metadata().unwrap()).await;
        assert_eq!((new.uid(), new.gid(), new.mode() & 0o777), (1234, 2345, 0o600));
    }

    #[tokio::test]
    async fn a_user_has_one_identity_as_long_as_somebody_has_it() {
        let user = User::new(4321, 1, &[], None);
        let (one, other) = (Identity::of(&user).unwrap().unwrap(), Identity::of(&user).unwrap().unwrap());
        assert!(Arc::ptr_eq(&one, &other));
        let worker = || {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
            let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
            names.filter(|name| name.trim() == "user-4321").count()
        };
        assert_eq!(worker(), 1);
        drop((one, other));
        let ended = async {
            while worker() > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(10), ended).await.unwrap();
        drop(Identity::of(&user).unwrap().unwrap());
    }

    #[tokio::test]
    async fn work_of_the_process_is_done_at_home() {
        let identity = Identity::of(&someone()).unwrap().unwrap();
        let uid = || async { tokio::task::spawn_blocking(|| status("Uid")).await.unwrap() };
        let (theirs, ours) = {
            let _entered = identity.enter().unwrap();
            // As wasmtime-wasi-http does it.
            (tokio::spawn(uid()), tokio::spawn(at_home(uid())))
        };
        assert_eq!((&*theirs.await.unwrap(), &*ours.await.unwrap()), ("0 0 0 1234", "0 0 0 0"));
        assert_eq!(at_home(uid()).await, "0 0 0 0");
    }

    #[test]
    fn nobody_can_be_minus_one() {
        let error = Identity::of(&User::new(u32::MAX, 1, &[], None)).unwrap_err().to_string();
        assert!(error.contains("process.user: access files as uid 4294967295"), "{error}");
        assert!(Path::new("/proc/thread-self").exists() && status("Uid") == "0 0 0 0");
    }
}
