//! The socket of a group: who may bind it, who may remove it, and how one knows whether its daemon lives.
//!
//! ```text
//! start:   lock ─ connect ─┬─ accepted ─ touch ─ unlock ─ answer
//!                          └─ refused ── unlink, bind, listen ─ launch ─ unlock
//! daemon:  lock ─ connection waiting, or touched a moment ago? ─┬─ yes ─ unlock, stay
//!                                                               └─ no ── unlink ─ unlock, leave
//! ```
//! Invariant: a socket is bound, probed and removed only under the lock of its directory, so a `start` never hands out
//! the address of a daemon that has just decided to leave, and two `start`s never make two daemons. The lock is an
//! `flock` on the directory itself: no file stays behind, and it ends with the process that holds it. It is held for
//! microseconds (a launch: until the child is spawned), never while somebody gets ready. `touch` bridges the time
//! between the answer of `start` and containerd's own connection.
//! Called by `launch` and `cleanup`, and by the daemon when it leaves.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, Timestamps, UTIME_NOW, flock, open, utimensat};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
use rustix::process::umask;

/// Nobody holds the lock longer than a spawn takes; ten seconds mean a stopped process or a machine on its knees.
pub const LOCK_WAIT: Duration = Duration::from_secs(10);

/// A node may start hundreds of containers at once, each with a connection or two before the daemon gets to accept.
const BACKLOG: i32 = 1024;

/// The lock of a socket directory; dropping it unlocks.
#[derive(Debug)]
pub struct Lock {
    _dir: OwnedFd,
}

/// Locks the directory, waiting no longer than `wait`.
pub fn lock_socket_dir(dir: &Path, wait: Duration) -> io::Result<Lock> {
    let fd = open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let deadline = Instant::now() + wait;
    // flock has no timeout, and a signal or a thread to interrupt it would cost more than these short naps.
    let mut nap = Duration::from_micros(100);
    loop {
        match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Lock { _dir: fd }),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                thread::sleep(nap);
                nap = (nap * 2).min(Duration::from_millis(5));
            }
            Err(Errno::WOULDBLOCK) => {
                let text = format!("another process has held the lock for {wait:?} (see /proc/locks)");
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            Err(other) => return Err(other.into()),
        }
    }
}

/// containerd makes `/run/containerd/s` itself; an own `socket_dir` may be new.
pub fn create_socket_dir(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// Whether somebody listens. Does not wait: a daemon whose backlog is full is busy, not dead.
pub fn is_alive(socket: &Path, _lock: &Lock) -> io::Result<bool> {
    let fd = new_socket(SocketFlags::NONBLOCK)?;
    match connect(&fd, &SocketAddrUnix::new(socket)?) {
        Ok(()) => Ok(!is_exiting(&fd)),
        Err(Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(other) => Err(other.into()),
    }
}

/// Whether who listens is on its way out: a killed process still accepts until the kernel closes its files, a moment after
/// it took its memory, and with that its program, away.
fn is_exiting(connection: &OwnedFd) -> bool {
    let Ok(peer) = socket_peercred(connection) else { return false };
    let program = fs::read_link(format!("/proc/{}/exe", peer.pid.as_raw_nonzero()));
    program.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Tells the daemon that a container is on its way: it does not leave for a while (see [`retire`]).
pub fn touch(socket: &Path, _lock: &Lock) -> io::Result<()> {
    let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    Ok(utimensat(CWD, socket, &Timestamps { last_access: now, last_modification: now }, AtFlags::empty())?)
}

/// Replaces whatever a dead daemon left. Only root may connect.
pub fn bind_socket(socket: &Path, lock: &Lock) -> io::Result<OwnedFd> {
    unlink(socket, lock)?;
    let fd = new_socket(SocketFlags::empty())?;
    // By the umask, so that there is no moment at which the socket is open to everybody. `start` has one thread.
    let before = umask(Mode::from_raw_mode(0o177));
    let bound = bind(&fd, &SocketAddrUnix::new(socket)?);
    umask(before);
    bound?;
    listen_on(&fd)?;
    Ok(fd)
}

pub fn listen_on(socket: impl AsFd) -> io::Result<()> {
    Ok(listen(socket, BACKLOG)?)
}

/// Removes the socket of a daemon that is gone. False when it lives.
pub fn remove_dead(socket: &Path, wait: Duration) -> io::Result<bool> {
    let Some(dir) = socket.parent().filter(|dir| dir.is_dir()) else {
        return Ok(true);
    };
    let lock = lock_socket_dir(dir, wait)?;
    if is_alive(socket, &lock)? {
        return Ok(false);
    }
    unlink(socket, &lock).map(|()| true)
}

/// The daemon's way out: true when the socket is gone and it may exit; false when a container is on its way, that is a
/// connection waits or `start` handed the address out less than `quiet` ago.
pub fn retire(listener: impl AsFd, socket: &Path, quiet: Duration) -> io::Result<bool> {
    let lock = lock_socket_dir(socket.parent().unwrap_or(Path::new("/")), LOCK_WAIT)?;
    let mut fds = [PollFd::new(&listener, PollFlags::IN)];
    if poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? > 0 || touched_within(socket, quiet)? {
        return Ok(false);
    }
    unlink(socket, &lock).map(|()| true)
}

/// The daemon's way out on SIGTERM: new containers find no socket and get a new daemon.
pub fn abandon(socket: &Path) -> io::Result<()> {
    let lock = lock_socket_dir(socket.parent().unwrap_or(Path::new("/")), LOCK_WAIT)?;
    unlink(socket, &lock)
}

fn touched_within(socket: &Path, quiet: Duration) -> io::Result<bool> {
    let touched = match fs::symlink_metadata(socket) {
        Ok(metadata) => metadata.modified()?,
        // Somebody removed it by hand: no new container can come this way.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    // The distance either way: after the clock was set back, a time in the future must not keep the daemon for ever.
    let now = SystemTime::now();
    let distance = now.duration_since(touched).unwrap_or_else(|ahead| ahead.duration());
    Ok(distance < quiet)
}

fn unlink(socket: &Path, _lock: &Lock) -> io::Result<()> {
    match fs::symlink_metadata(socket) {
        // Only ever a socket: a path from an `address` file is not trusted with anything else.
        Ok(metadata) if !metadata.file_type().is_socket() => {
            Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{} is not a socket", socket.display())))
        }
        Ok(_) => fs::remove_file(socket),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn new_socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags | SocketFlags::CLOEXEC, None)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    #[test]
    fn a_bound_socket_is_alive_private_and_dead_once_closed() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let lock = lock_socket_dir(dir.path(), SHORT).unwrap();
        assert!(!is_alive(&socket, &lock).unwrap());
        let listener = bind_socket(&socket, &lock).unwrap();
        assert!(is_alive(&socket, &lock).unwrap());
        assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
        drop(listener);
        assert!(!is_alive(&socket, &lock).unwrap());
        let _second = bind_socket(&socket, &lock).unwrap();
        assert!(is_alive(&socket, &lock).unwrap());
    }

    #[test]
    fn a_daemon_with_a_full_backlog_is_alive() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let lock = lock_socket_dir(dir.path(), SHORT).unwrap();
        let listener = bind_socket(&socket, &lock).unwrap();
        listen(&listener, 0).unwrap();
        assert!((0..4).all(|_| is_alive(&socket, &lock).unwrap()));
    }

    #[test]
    fn the_lock_excludes_and_gives_up_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let lock = lock_socket_dir(dir.path(), SHORT).unwrap();
        let before = Instant::now();
        assert_eq!(lock_socket_dir(dir.path(), SHORT).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(before.elapsed() < SHORT * 10);
        drop(lock);
        assert!(lock_socket_dir(dir.path(), SHORT).is_ok());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "no lock file");
    }

    #[test]
    fn a_daemon_retires_only_when_nobody_is_coming() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let lock = lock_socket_dir(dir.path(), SHORT).unwrap();
        let listener = bind_socket(&socket, &lock).unwrap();
        touch(&socket, &lock).unwrap();
        drop(lock);
        assert!(!retire(&listener, &socket, Duration::from_secs(60)).unwrap(), "touched");
        let waiting = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        assert!(!retire(&listener, &socket, Duration::ZERO).unwrap(), "a connection waits");
        drop(std::os::unix::net::UnixListener::from(listener.try_clone().unwrap()).accept().unwrap());
        drop(waiting);
        assert!(retire(&listener, &socket, Duration::ZERO).unwrap());
        assert!(!socket.exists());
    }

    #[test]
    fn only_dead_sockets_and_only_sockets_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, file) = (dir.path().join("s"), dir.path().join("f"));
        let lock = lock_socket_dir(dir.path(), SHORT).unwrap();
        let listener = bind_socket(&socket, &lock).unwrap();
        drop(lock);
        assert!(!remove_dead(&socket, SHORT).unwrap());
        drop(listener);
        assert!(remove_dead(&socket, SHORT).unwrap() && !socket.exists());
        assert!(remove_dead(&socket, SHORT).unwrap(), "nothing left is fine");
        assert!(remove_dead(Path::new("/nowhere/s"), SHORT).unwrap());
        fs::write(&file, "precious").unwrap();
        assert!(remove_dead(&file, SHORT).is_err() && file.exists());
    }
}
