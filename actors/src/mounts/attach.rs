//! Mounting volumes into a root filesystem.
//!
//! ```text
//!   source ─▶ a copy of its mounts, attached nowhere ─▶ attributes ─▶ moved to the target, open
//!   tmpfs  ─▶ made, attached nowhere ───────────────▶
//! ```
//! A mount appears where it belongs in one step and with its attributes, and the target is a descriptor (`target.rs`): no
//! name is looked up twice. Everything here may block for as long as the source does (a dead NFS server).

use std::cell::OnceCell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, PROC_SUPER_MAGIC, Stat, fstat, fstatfs, major, minor, open, readlinkat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use super::target::{Shape, Target, open_or_make};
use super::volume::{Attributes, Kind, Propagation, Volume};
use crate::error::{Error, Result};

/// The devices that a container has anyway (major 1): null, zero, full, random, urandom.
const HARMLESS: [u32; 5] = [3, 5, 7, 8, 9];

/// Puts volumes into one root.
pub(super) struct Attacher<'a> {
    root: BorrowedFd<'a>,
    /// Where the process sees a proc file system.
    procs: OnceCell<Vec<PathBuf>>,
}

impl<'a> Attacher<'a> {
    pub fn new(root: BorrowedFd<'a>) -> Self {
        Self { root, procs: OnceCell::new() }
    }

    /// Mounts one volume; its target is made if need be.
    ///
    /// # Errors
    /// With the source, the target and the cause.
    pub fn attach(&self, volume: &Volume) -> Result<()> {
        match &volume.kind {
            Kind::Bind { source, recursive } => self.bind(volume, source, *recursive),
            Kind::Tmpfs { options } => self.tmpfs(volume, options),
        }
    }

    fn bind(&self, volume: &Volume, path: &Path, recursive: bool) -> Result<()> {
        let refused = |e: Errno| Error::host(format!("{}: the source", volume.what()), e);
        let source = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(refused)?;
        let stat = fstat(&source).map_err(refused)?;
        let shape = Shape::of(&stat);
        // Nothing can be mounted below a file, and the table of all mounts is long to read where many containers run.
        let recursive = recursive && shape == Shape::Folder;
        self.refuse_proc(volume, &source, recursive)?;
        let mut flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
        let tree = open_tree(&source, "", flags).map_err(refused)?;
        let all = if is_harmless(&stat) { volume.all } else { volume.all.and(Attributes::NO_DEVICES) };
        let target = self.target(volume, shape)?;
        finish(volume, all, &tree, &target)
    }

    /// As runc does it: with the mode of the folder that is there, unless the options say another.
    fn tmpfs(&self, volume: &Volume, options: &[String]) -> Result<()> {
        let failed = |e: Errno| Error::host(volume.what(), e);
        let target = self.target(volume, Shape::Folder)?;
        let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed)?;
        if !target.is_new {
            let mode = fstat(&target.file).map_err(failed)?.st_mode & 0o7777;
            fsconfig_set_string(&fs, "mode", format!("{mode:o}")).map_err(failed)?;
        }
        for option in options {
            let set = match option.split_once('=') {
                Some((key, value)) => fsconfig_set_string(&fs, key, value),
                None => fsconfig_set_flag(&fs, option.as_str()),
            };
            set.map_err(|e| Error::host(format!("{}: the option {option}", volume.what()), e))?;
        }
        fsconfig_create(&fs).map_err(failed)?;
        let tree = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).map_err(failed)?;
        finish(volume, volume.all.and(Attributes::NO_DEVICES), &tree, &target)
    }

    fn target(&self, volume: &Volume, shape: Shape) -> Result<Target> {
        let target = open_or_make(self.root, &volume.target, shape)
            .map_err(|e| Error::host(format!("{}: the target", volume.what()), e))?;
        let invalid = |why: &str| Err(Error::invalid(format!("{}: {why}", volume.what())));
        match (shape, target.shape) {
            _ if target.is_root => invalid("it would replace the root filesystem"),
            (Shape::Folder, Shape::File) => invalid("the target is a file, the source is a folder"),
            (Shape::File, Shape::Folder) => invalid("the target is a folder, the source is none"),
            (Shape::Folder, Shape::Folder) | (Shape::File, Shape::File) => Ok(target),
        }
    }

    /// To whoever reads it, `/proc/self` is this process, and `/proc/self/mem` its memory.
    fn refuse_proc(&self, volume: &Volume, source: &OwnedFd, recursive: bool) -> Result<()> {
        let failed = |e: Errno| Error::host(format!("{}: the source", volume.what()), e);
        let mut is_proc = fstatfs(source).map_err(failed)?.f_type == PROC_SUPER_MAGIC;
        if !is_proc && recursive {
            let path = path_of(source).map_err(failed)?;
            let procs = self.procs.get_or_init(proc_mounts);
            is_proc = procs.iter().any(|proc| proc.starts_with(&path));
        }
        if is_proc {
            return Err(Error::Unsupported(format!(
                "{}: the source holds a proc file system, through which a guest would reach this process; mount the \
                 folders that are needed",
                volume.what()
            )));
        }
        Ok(())
    }
}

/// Attributes, then the place.
fn finish(volume: &Volume, all: Attributes, tree: &OwnedFd, target: &Target) -> Result<()> {
    let failed = |e: Errno| Error::host(volume.what(), e);
    set_attributes(tree, all, true, Some(volume.propagation)).map_err(failed)?;
    if !volume.own.is_empty() {
        set_attributes(tree, volume.own, false, None).map_err(failed)?;
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", &target.file, "", flags).map_err(failed)
}

/// Changes the mount that is open at its root, and those below it if `recursive`.
pub(super) fn set_attributes(
    mount: impl AsFd,
    attributes: Attributes,
    recursive: bool,
    propagation: Option<Propagation>,
) -> Result<(), Errno> {
    let change = libc::mount_attr {
        attr_set: attributes.set.into(),
        attr_clr: attributes.clear.into(),
        propagation: match propagation {
            None => 0,
            Some(Propagation::Private) => libc::MS_PRIVATE,
            Some(Propagation::Slave) => libc::MS_SLAVE,
        },
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the descriptor is open, the path ends with a zero, and the kernel reads `change` and no more of it than the
    // size it is given.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const change,
            size_of::<libc::mount_attr>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(last_error()) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn is_harmless(stat: &Stat) -> bool {
    let kind = FileType::from_raw_mode(stat.st_mode);
    kind == FileType::CharacterDevice && major(stat.st_rdev) == 1 && HARMLESS.contains(&minor(stat.st_rdev))
}

/// Where an open file is, as the kernel sees it.
pub(super) fn path_of(file: &OwnedFd) -> rustix::io::Result<PathBuf> {
    use std::os::unix::ffi::OsStringExt as _;
    let link = readlinkat(CWD, format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new())?;
    Ok(std::ffi::OsString::from_vec(link.into_bytes()).into())
}

/// What cannot be read holds none: the process's own `/proc` is the first that would be found.
fn proc_mounts() -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().filter_map(proc_mount).collect()
}

/// proc(5), /proc/pid/mountinfo: the mount point is field 5, the type follows the dash.
fn proc_mount(line: &str) -> Option<PathBuf> {
    let (fields, rest) = line.split_once(" - ")?;
    let point = fields.split(' ').nth(4)?;
    rest.starts_with("proc ").then(|| point.replace(r"\040", " ").replace(r"\134", r"\").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_found_among_mounts() {
        let line = "24 30 0:22 / /a\\040b/proc rw,nosuid shared:12 - proc proc rw";
        assert_eq!(proc_mount(line), Some("/a b/proc".into()));
        assert_eq!(proc_mount("25 30 0:23 / /sys rw - sysfs sysfs rw"), None);
        assert!(proc_mounts().contains(&"/proc".into()));
    }

    #[test]
    fn harmless_devices_are_told_from_others() {
        let stat = |path: &str| rustix::fs::stat(path).unwrap();
        assert!(is_harmless(&stat("/dev/null")));
        assert!(!is_harmless(&stat("/dev/tty")));
        assert!(!is_harmless(&stat("/etc/hosts")));
    }
}
