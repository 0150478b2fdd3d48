//! The root filesystem of a container and its volumes, mounted in the daemon's own mount namespace.
//!
//! ```text
//!   root, nothing on it a device ─▶ /dev ─▶ volumes, in their order ─▶ /dev read-only ─▶ root read-only, if asked
//! ```
//! Nothing is mounted on the host: [`isolate`] gives the daemon a mount namespace of its own first, so a killed daemon
//! leaves no mount behind. Everything here blocks: not for an actor's thread.

mod attach;
mod target;
mod volume;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, makedev, mkdirat, mknodat, openat2};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind_recursive, mount_change, mount_remount, unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::error::{Error, Result};
use crate::host;
use attach::{Attacher, set_attributes};
use volume::Attributes;
pub use volume::Volume;

/// One mount of the root filesystem, as containerd's snapshotter describes it.
#[derive(Debug, Clone, Default)]
pub struct Mount {
    /// Filesystem type, or `bind`.
    pub kind: String,
    pub source: String,
    /// As in fstab: flags (`ro`, `rbind`, …) and the filesystem's own options.
    pub options: Vec<String>,
}

/// A mounted root filesystem; dropping it unmounts all of it.
#[derive(Debug)]
pub struct RootFs {
    path: PathBuf,
    mounted: bool,
    is_writable: bool,
}

/// Gives the calling process a mount namespace of its own that still sees new mounts of the host (volumes), but shows
/// it none. Call while the process has one thread.
///
/// # Errors
/// When the kernel refuses (not root).
pub fn isolate() -> Result<()> {
    host::remember().map_err(|e| Error::host("open /", e))?;
    // SAFETY: `CLONE_NEWNS` separates no memory and no descriptor table; the process has one thread, so no other thread
    // can see a working directory or root change under it.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.map_err(|e| Error::host("make a mount namespace", e))?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(|e| Error::host("make / a slave mount", e))?;
    forget_networks();
    Ok(())
}

/// Lets go of the pods' networks that are mounted now. Where the host's mounts are not shared, nobody would do it later, and
/// a network lives as long as a mount of it.
fn forget_networks() {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let networks = table.lines().filter(|line| line.contains(" - nsfs "));
    for mount in networks.filter_map(|line| line.split(' ').nth(4)) {
        // One that stays is the host's to worry about.
        let _gone = unmount(mount, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    }
}

impl RootFs {
    /// Mounts `mounts` (usually one) at `<bundle>/rootfs`; with none, the directory `root` is used, bound there when it
    /// lies elsewhere. Nothing is added to what the image holds: see [`furnish`](Self::furnish).
    ///
    /// # Errors
    /// `Host` with the mount that failed; what was mounted before is unmounted.
    pub fn mount(bundle: &Path, root: &Path, mounts: &[Mount]) -> Result<Self> {
        let path = bundle.join("rootfs");
        if !path.is_dir() {
            std::fs::create_dir_all(&path).map_err(|e| Error::path("create", &path, e))?;
        }
        let mut rootfs = Self { path, mounted: false, is_writable: false };
        if mounts.is_empty() {
            rootfs.bind(root)?;
        }
        for mount in mounts {
            rootfs.add(mount)?;
        }
        Ok(rootfs)
    }

    /// Makes it what a wasm container sees: with `/dev` and `volumes`, then read-only if `readonly`. For others runc does
    /// that.
    ///
    /// # Errors
    /// `Host` with the mount that failed.
    pub fn furnish(&mut self, volumes: &[Volume], readonly: bool) -> Result<()> {
        self.is_writable = !readonly;
        let top = open_dir(&self.path)?;
        // An image may hold nodes of any device.
        set_attributes(&top, Attributes::NO_DEVICES, true, None)
            .map_err(|e| Error::path("forbid devices in", &self.path, e))?;
        let dev = self.add_dev(volumes.len())?;
        self.add_volumes(&top, volumes)?;
        if let Some(dev) = dev {
            set_attributes(&dev, Attributes::READ_ONLY, false, None)
                .map_err(|e| Error::path("make read-only", &self.path.join("dev"), e))?;
        }
        if readonly {
            set_attributes(&top, Attributes::READ_ONLY, false, None)
                .map_err(|e| Error::path("make read-only", &self.path, e))?;
        }
        Ok(())
    }

    /// An empty root, for volumes of a container that has none.
    pub fn nothing() -> Mount {
        let options = ["mode=755", "size=1m", "nr_inodes=10k"].map(String::from).to_vec();
        Mount { kind: "tmpfs".into(), source: "tmpfs".into(), options }
    }

    /// Whether a guest may write to any part of it.
    pub fn is_writable(&self) -> bool {
        self.is_writable
    }

    /// Where it is, for this process only.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn bind(&mut self, root: &Path) -> Result<()> {
        if !root.is_dir() {
            return Err(Error::invalid(format!("root.path: {} is not a directory", root.display())));
        }
        mount_bind_recursive(root, &self.path).map_err(|e| Error::path("bind-mount", root, e))?;
        self.mounted = true;
        Ok(())
    }

    fn add(&mut self, spec: &Mount) -> Result<()> {
        let (flags, data) = parse_options(spec);
        let what = || format!("mount {} {} at {}", spec.kind, spec.source, self.path.display());
        let source = Path::new(&spec.source);
        let done = if data.len() < page_size() {
            mount(source, &self.path, spec.kind.as_str(), flags, c_string(&data)?.as_deref())
        } else {
            mount_long(source, &self.path, spec, flags)
        };
        done.map_err(|e| Error::host(what(), e))?;
        self.mounted = true;
        // A bind mount takes its flags only when it is mounted again.
        if flags.contains(MountFlags::BIND) && flags.contains(MountFlags::RDONLY) {
            mount_remount(&self.path, flags | MountFlags::RDONLY, "").map_err(|e| Error::host(what(), e))?;
        }
        Ok(())
    }

    fn add_volumes(&mut self, top: &OwnedFd, volumes: &[Volume]) -> Result<()> {
        let attacher = Attacher::new(top.as_fd());
        for volume in volumes {
            match attacher.attach(volume) {
                Ok(()) => self.is_writable |= volume.is_writable(),
                // Nobody asked for it, and the root (read-only below us) has no place for it.
                Err(Error::Host { source, .. }) if volume.is_usual() && is_read_only(&source) => {
                    tracing::debug!(root = %self.path.display(), target = %volume.target.display(), "left out");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A small tmpfs with the five devices of a wasm container, and room for the places of so many volumes. A root that
    /// has no `/dev` and takes none (read-only below us) goes without.
    fn add_dev(&self, volumes: usize) -> Result<Option<OwnedFd>> {
        let root = open_dir(&self.path)?;
        let host = |e| Error::path("make the devices in", &self.path.join("dev"), e);
        match mkdirat(&root, "dev", Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(rustix::io::Errno::ROFS) => return Ok(None),
            Err(error) => return Err(host(error)),
        }
        // Not through a link of the image: it could name any directory.
        let dev = openat2(
            &root,
            "dev",
            OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
        )
        .map_err(host)?;
        let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
        let room = c_string(&format!("mode=755,size=4k,nr_inodes={}", 16 + 4 * volumes))?;
        mount("tmpfs", through(&dev), "tmpfs", flags, room.as_deref()).map_err(host)?;
        let dev = open_dir(&self.path.join("dev"))?;
        for (name, minor) in [("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)] {
            mknodat(&dev, name, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(1, minor))
                .map_err(host)?;
            rustix::fs::chmodat(&dev, name, Mode::from_raw_mode(0o666), rustix::fs::AtFlags::empty()).map_err(host)?;
        }
        Ok(Some(dev))
    }
}

fn is_read_only(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::ReadOnlyFilesystem
}

impl Drop for RootFs {
    fn drop(&mut self) {
        if self.mounted
            && let Err(error) = unmount(&self.path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        {
            tracing::error!(path = %self.path.display(), %error, "a root filesystem stays mounted");
        }
    }
}

/// Flags and data of fstab-like options; what is no flag is the filesystem's.
fn parse_options(spec: &Mount) -> (MountFlags, String) {
    let mut flags = if spec.kind == "bind" { MountFlags::BIND } else { MountFlags::empty() };
    let mut data = Vec::new();
    for option in &spec.options {
        match option.as_str() {
            "ro" => flags |= MountFlags::RDONLY,
            "rw" => flags -= MountFlags::RDONLY,
            "bind" => flags |= MountFlags::BIND,
            "rbind" => flags |= MountFlags::BIND | MountFlags::REC,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "noatime" => flags |= MountFlags::NOATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "" | "defaults" | "suid" | "dev" | "exec" => {}
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

/// Options longer than a page (an overlay of many layers) do not pass through mount(2); the new mount API takes them
/// one by one, and layers with `lowerdir+` (Linux 6.8).
fn mount_long(source: &Path, target: &Path, spec: &Mount, flags: MountFlags) -> rustix::io::Result<()> {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
        fsconfig_set_string, fsmount, fsopen, move_mount,
    };
    let fs = fsopen(spec.kind.as_str(), FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "source", source)?;
    let (_, data) = parse_options(spec);
    for option in data.split(',') {
        match option.split_once('=') {
            Some(("lowerdir", layers)) => {
                layers.split(':').try_for_each(|layer| fsconfig_set_string(&fs, "lowerdir+", layer))?;
            }
            Some((key, value)) => fsconfig_set_string(&fs, key, value)?,
            None => fsconfig_set_flag(&fs, option)?,
        }
    }
    fsconfig_create(&fs)?;
    let readonly = flags.contains(MountFlags::RDONLY);
    let attributes = if readonly { MountAttrFlags::MOUNT_ATTR_RDONLY } else { MountAttrFlags::empty() };
    let made = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(&made, "", rustix::fs::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

fn c_string(data: &str) -> Result<Option<std::ffi::CString>> {
    if data.is_empty() {
        return Ok(None);
    }
    std::ffi::CString::new(data).map(Some).map_err(|_| Error::invalid("a mount option contains a zero byte"))
}

fn open_dir(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|e| Error::path("open", path, e))
}

/// A path that means exactly the directory we have open, whatever its name leads to by now.
fn through(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

fn page_size() -> usize {
    rustix::param::page_size()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split_into_flags_and_data() {
        let options = ["ro", "rbind", "lowerdir=/a:/b", "nosuid", "index=off", "defaults"].map(String::from).to_vec();
        let (flags, data) = parse_options(&Mount { kind: "overlay".into(), source: "overlay".into(), options });
        assert_eq!(flags, MountFlags::RDONLY | MountFlags::BIND | MountFlags::REC | MountFlags::NOSUID);
        assert_eq!(data, "lowerdir=/a:/b,index=off");
        let (flags, _) = parse_options(&Mount { kind: "bind".into(), ..Default::default() });
        assert_eq!(flags, MountFlags::BIND);
    }
}
