//! The mounts of an OCI spec (config.md, Mounts), reduced to those that mean something to a wasm container.
//!
//! Pure: what a mount asks for is read and judged here, `attach.rs` does it. Left out without a word are the file systems
//! of a Linux program's surroundings, which every spec lists (proc, sysfs, cgroups, devpts, mqueue, the tmpfs on `/dev`).
//! Whatever else a wasm container cannot have is an error that names the mount: data that is silently not there is lost.

use std::path::{Path, PathBuf};

use oci_spec::runtime;
use rustix::mount::MountAttrFlags;

use crate::error::{Error, Result};

/// A mount that the container gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Where it is seen, absolute in the container.
    pub target: PathBuf,
    pub kind: Kind,
    /// Of the mount alone, and of those below it, too.
    pub own: Attributes,
    pub all: Attributes,
    pub propagation: Propagation,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A file or folder of the host; with the mounts below it if `recursive`.
    Bind { source: PathBuf, recursive: bool },
    /// Memory, with the file system's own options (`size`, `mode`, …).
    Tmpfs { options: Vec<String> },
}

/// What to change about mounts; all else stays as it is at the source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    pub set: u32,
    pub clear: u32,
}

/// Whether what the host mounts below the source later is seen as well. There is no way back: nothing in a wasm container
/// mounts anything, so `shared` is no more than `slave`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Propagation {
    /// Not by default.
    #[default]
    Private,
    Slave,
}

const RDONLY: u32 = MountAttrFlags::MOUNT_ATTR_RDONLY.bits();
const NOSUID: u32 = MountAttrFlags::MOUNT_ATTR_NOSUID.bits();
const NODEV: u32 = MountAttrFlags::MOUNT_ATTR_NODEV.bits();
const NOEXEC: u32 = MountAttrFlags::MOUNT_ATTR_NOEXEC.bits();
const ATIME: u32 = MountAttrFlags::MOUNT_ATTR__ATIME.bits();
const NOATIME: u32 = MountAttrFlags::MOUNT_ATTR_NOATIME.bits();
const STRICTATIME: u32 = MountAttrFlags::MOUNT_ATTR_STRICTATIME.bits();
const NODIRATIME: u32 = MountAttrFlags::MOUNT_ATTR_NODIRATIME.bits();
/// Not by that name in rustix 1.1.
const NOSYMFOLLOW: u32 = 0x20_0000;

impl Attributes {
    /// What every mount of a container has: a device of the host is not the guest's to open.
    pub const NO_DEVICES: Self = Self { set: NODEV, clear: 0 };
    pub const READ_ONLY: Self = Self { set: RDONLY, clear: 0 };

    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    pub fn and(self, later: Self) -> Self {
        let Self { set, clear } = later;
        Self { set: (self.set & !clear) | set, clear: (self.clear & !set) | clear | (set & ATIME) }
    }

    pub fn is_read_only(self) -> bool {
        self.set & RDONLY != 0
    }
}

/// File systems of a Linux program's surroundings.
const SURROUNDINGS: [&str; 16] = [
    "proc",
    "sysfs",
    "cgroup",
    "cgroup2",
    "mqueue",
    "devpts",
    "devtmpfs",
    "securityfs",
    "debugfs",
    "tracefs",
    "bpf",
    "configfs",
    "fusectl",
    "hugetlbfs",
    "pstore",
    "binfmt_misc",
];

/// What clients mount without being asked. A root that cannot hold them goes without.
const USUAL: [&str; 6] =
    ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/dev/shm", "/dev/termination-log", "/run"];

/// Options about a file system as a whole or about the security of programs: they change nothing for a bind mount.
const WITHOUT_EFFECT: [&str; 18] = [
    "",
    "defaults",
    "bind",
    "rbind",
    "async",
    "sync",
    "dirsync",
    "mand",
    "nomand",
    "silent",
    "loud",
    "iversion",
    "noiversion",
    "lazytime",
    "nolazytime",
    "acl",
    "noacl",
    "nostrictatime",
];

impl Volume {
    /// The volumes among the mounts of a spec, in its order. Relative sources are of the bundle.
    ///
    /// # Errors
    /// `Unsupported` or `Invalid`, with the destination.
    pub fn all(mounts: &[runtime::Mount], bundle: &Path) -> Result<Vec<Self>> {
        mounts.iter().filter_map(|mount| Self::of(mount, bundle).transpose()).collect()
    }

    fn of(mount: &runtime::Mount, bundle: &Path) -> Result<Option<Self>> {
        let target = mount.destination().clone();
        let options = mount.options().as_deref().unwrap_or_default();
        let has = |name: &str| options.iter().any(|option| option == name);
        let kind = mount.typ().as_deref().unwrap_or_default();
        let is_bind = kind == "bind" || has("bind") || has("rbind");
        if !is_bind && (SURROUNDINGS.contains(&kind) || target == Path::new("/dev")) {
            return Ok(None);
        }
        let at = |what: &str| format!("mounts: {}: {what}", target.display());
        let invalid = |what: &str| Err(Error::invalid(at(what)));
        let unsupported = |what: &str| Err(Error::Unsupported(at(what)));
        if !target.is_absolute() {
            return invalid("the destination is not absolute");
        }
        if target == Path::new("/dev") {
            return unsupported("it would replace its devices");
        }
        if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() || has("idmap") || has("ridmap") {
            return unsupported("mapped owners are not supported; run without user namespaces");
        }
        let kind = match (is_bind, kind) {
            (true, _) => {
                let Some(source) = mount.source() else { return invalid("a bind mount without a source") };
                Kind::Bind { source: bundle.join(source), recursive: has("rbind") }
            }
            (false, "tmpfs") => Kind::Tmpfs { options: Vec::new() },
            (false, "") => return invalid("neither a type nor the option bind"),
            (false, other) => {
                return unsupported(&format!("the type {other} is not supported; mount it on the host and bind it"));
            }
        };
        let mut volume = Self {
            target: target.clone(),
            kind,
            own: Attributes::default(),
            all: Attributes::default(),
            propagation: Propagation::Private,
        };
        options.iter().try_for_each(|option| volume.add(option)).map_err(|what| Error::Unsupported(at(&what)))?;
        Ok(Some(volume))
    }

    fn add(&mut self, option: &str) -> Result<(), String> {
        if let Some(attributes) = attributes(option) {
            self.own = self.own.and(attributes);
        } else if let Some(attributes) = option.strip_prefix('r').and_then(attributes) {
            self.all = self.all.and(attributes);
        } else if let Some(propagation) = propagation(option) {
            self.propagation = propagation;
        } else if option == "tmpcopyup" {
            return Err("the option tmpcopyup is not supported: the folder would be empty".into());
        } else if !WITHOUT_EFFECT.contains(&option) {
            match &mut self.kind {
                Kind::Tmpfs { options } => options.push(option.to_owned()),
                Kind::Bind { .. } => return Err(format!("the option {option} is unknown")),
            }
        }
        Ok(())
    }

    /// Whether clients mount it without being asked.
    pub fn is_usual(&self) -> bool {
        USUAL.iter().any(|usual| self.target == Path::new(usual))
    }

    /// Whether a guest may write to it, as far as this mount decides.
    pub fn is_writable(&self) -> bool {
        !self.own.is_read_only() && !self.all.is_read_only()
    }

    /// What it is, for messages.
    pub fn what(&self) -> String {
        match &self.kind {
            Kind::Bind { source, .. } => format!("mount {} at {}", source.display(), self.target.display()),
            Kind::Tmpfs { .. } => format!("mount a tmpfs at {}", self.target.display()),
        }
    }
}

/// Those of fstab and runc. `dev` is left out of effect: see [`Attributes::NO_DEVICES`].
fn attributes(option: &str) -> Option<Attributes> {
    let (set, clear) = match option {
        "ro" => (RDONLY, 0),
        "rw" => (0, RDONLY),
        "nosuid" => (NOSUID, 0),
        "suid" => (0, NOSUID),
        "nodev" => (NODEV, 0),
        "dev" | "norelatime" => (0, 0),
        "noexec" => (NOEXEC, 0),
        "exec" => (0, NOEXEC),
        "noatime" => (NOATIME, ATIME),
        "atime" | "relatime" => (0, ATIME),
        "strictatime" => (STRICTATIME, ATIME),
        "nodiratime" => (NODIRATIME, 0),
        "diratime" => (0, NODIRATIME),
        "nosymfollow" => (NOSYMFOLLOW, 0),
        "symfollow" => (0, NOSYMFOLLOW),
        _ => return None,
    };
    Some(Attributes { set, clear })
}

fn propagation(option: &str) -> Option<Propagation> {
    match option {
        "private" | "rprivate" | "unbindable" | "runbindable" => Some(Propagation::Private),
        "slave" | "rslave" | "shared" | "rshared" => Some(Propagation::Slave),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Vec<Volume>> {
        Volume::all(&[serde_json::from_str(json).unwrap()], Path::new("/bundle"))
    }

    fn bind(options: &str) -> Result<Volume> {
        let json = format!(r#"{{"destination":"/data","type":"bind","source":"/src","options":[{options}]}}"#);
        parse(&json).map(|mut volumes| volumes.remove(0))
    }

    #[test]
    fn the_surroundings_of_a_linux_program_are_left_out() {
        for (destination, kind) in [
            ("/proc", "proc"),
            ("/sys", "sysfs"),
            ("/dev", "tmpfs"),
            ("/dev/pts", "devpts"),
            ("/sys/fs/cgroup", "cgroup"),
        ] {
            let json = format!(r#"{{"destination":"{destination}","type":"{kind}","source":"x"}}"#);
            assert_eq!(parse(&json).unwrap(), []);
        }
    }

    #[test]
    fn a_bind_mount_is_one_by_type_or_by_option() {
        assert_eq!(bind("").unwrap().kind, Kind::Bind { source: "/src".into(), recursive: false });
        let volumes = parse(r#"{"destination":"/d","type":"none","source":"a","options":["rbind","ro"]}"#).unwrap();
        assert_eq!(volumes[0].kind, Kind::Bind { source: "/bundle/a".into(), recursive: true });
        assert!(!volumes[0].is_writable());
    }

    #[test]
    fn what_is_below_is_read_only_where_asked_alone() {
        let volume = bind(r#""rbind","ro""#).unwrap();
        assert!(volume.own.is_read_only() && !volume.all.is_read_only());
        let volume = bind(r#""rbind","rro","rslave""#).unwrap();
        assert!(!volume.own.is_read_only() && volume.all.is_read_only());
        assert_eq!(volume.propagation, Propagation::Slave);
    }

    #[test]
    fn the_last_word_counts() {
        assert!(bind(r#""ro","rw""#).unwrap().is_writable());
        assert!(!bind(r#""rw","ro""#).unwrap().is_writable());
        let volume = bind(r#""noatime","strictatime""#).unwrap();
        assert_eq!((volume.own.set & ATIME, volume.own.clear & ATIME), (STRICTATIME, ATIME));
    }

    #[test]
    fn a_tmpfs_keeps_its_own_options() {
        let json = r#"{"destination":"/run","type":"tmpfs","source":"tmpfs",
            "options":["nosuid","strictatime","mode=755","size=65536k"]}"#;
        let volume = &parse(json).unwrap()[0];
        assert_eq!(volume.kind, Kind::Tmpfs { options: vec!["mode=755".into(), "size=65536k".into()] });
        assert!(volume.is_usual() && volume.is_writable());
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (json, words) in [
            (r#"{"destination":"/d","type":"ext4","source":"/dev/sda"}"#, "/d: the type ext4 is not supported"),
            (r#"{"destination":"/d","type":"bind"}"#, "/d: a bind mount without a source"),
            (r#"{"destination":"/d","source":"/a"}"#, "/d: neither a type"),
            (r#"{"destination":"d","type":"bind","source":"/a"}"#, "not absolute"),
            (r#"{"destination":"/d","type":"bind","source":"/a","options":["ridmap"]}"#, "mapped owners"),
            (r#"{"destination":"/d","type":"bind","source":"/a","options":["r0"]}"#, "the option r0 is unknown"),
            (r#"{"destination":"/d","type":"tmpfs","options":["tmpcopyup"]}"#, "tmpcopyup is not supported"),
        ] {
            let error = parse(json).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
