//! The host's file tree, as it goes on outside of the daemon's own mount namespace.
//!
//! Mounts that the host makes after the daemon's start reach us where its mounts are shared, as systemd has them and as
//! Kubernetes wants them for volumes. The network namespaces of pods are such mounts, and a pod must not depend on that:
//! so a descriptor of the host's root is kept, and a path that is looked up from there meets the host's mounts of today.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};

static ROOT: OnceLock<OwnedFd> = OnceLock::new();

/// Remembers the root that the calling process still shares with the host.
///
/// # Errors
/// The kernel's refusal.
pub fn remember() -> io::Result<()> {
    let root = open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // Called once; a second root would be the same.
    let _first = ROOT.set(root);
    Ok(())
}

/// Opens a file of the host for reading. One below /proc is opened where we are: its links lead to things, not to paths.
///
/// # Errors
/// The kernel's refusal.
pub fn open_file(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    match ROOT.get() {
        Some(root) if !path.starts_with("/proc") => {
            Ok(openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)?)
        }
        Some(_) | None => Ok(open(path, flags, Mode::empty())?),
    }
}
