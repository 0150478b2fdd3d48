//! The bundle of a container: `config.json` read once and reduced to what a wasm container has.
//!
//! What the OCI runtime spec (v1.2, config.md and config-linux.md) says and WebAssembly has no notion of (capabilities,
//! seccomp, rlimits, devices) is left out here, in one place.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Mount, Process, Root, Spec};

use crate::error::{Error, Result};
use crate::pod::Role;
use crate::resources::Limits;
use crate::users::User;

/// A config.json larger than this is refused; 10,000 arguments of 100 bytes fit four times.
const MAX_CONFIG: u64 = 4 << 20;

/// Where containerd leaves room for the root filesystem in a bundle.
const ROOTFS: &str = "rootfs";

/// The part of a container's spec that matters to us.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Directory of the bundle, as containerd named it.
    pub path: PathBuf,
    /// Where the root filesystem is, or is to be mounted (absolute).
    pub root: PathBuf,
    /// The spec asks for a read-only root.
    pub readonly: bool,
    /// Arguments; the first names the program and is passed to it as `argv[0]`. Without any, the image's only module runs.
    pub args: Vec<String>,
    /// Environment, in the order of the spec.
    pub env: Vec<(String, String)>,
    /// Working directory, absolute inside the container.
    pub cwd: PathBuf,
    /// Hostname for a new UTS namespace.
    pub hostname: Option<String>,
    /// Namespaces the spec asks for.
    pub namespaces: Namespaces,
    /// How much CPU time and memory it may use.
    pub limits: Limits,
    /// Annotations of the container.
    pub annotations: HashMap<String, String>,
    /// What it is to its pod.
    pub role: Role,
    /// The files that the spec mounts over /etc/hosts and /etc/resolv.conf, on the host.
    pub hosts: Option<PathBuf>,
    pub resolv_conf: Option<PathBuf>,
    /// The mounts of the spec, as they are there.
    pub mounts: Vec<Mount>,
    /// The spec asks for a terminal.
    pub terminal: bool,
    /// Whose rights decide about files.
    pub user: User,
}

/// What the spec says of one namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Namespace {
    /// Not mentioned: the host's.
    #[default]
    Host,
    /// A new one.
    New,
    /// The one at this path.
    Join(PathBuf),
}

/// The namespaces that a thread of ours can be in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Namespaces {
    pub network: Namespace,
    pub ipc: Namespace,
    pub uts: Namespace,
}

impl Bundle {
    /// Reads `<path>/config.json`. Blocks on the disk: not for an actor's thread.
    ///
    /// # Errors
    /// `Invalid` with the file's path and what is wrong in it.
    pub fn load(path: &Path) -> Result<Self> {
        let file = path.join("config.json");
        let size = std::fs::metadata(&file).map_err(|e| Error::invalid(format!("{}: {e}", file.display())))?.len();
        if size > MAX_CONFIG {
            return Err(Error::invalid(format!(
                "{}: {size} bytes, more than the {MAX_CONFIG} accepted",
                file.display()
            )));
        }
        let text = std::fs::read(&file).map_err(|e| Error::invalid(format!("{}: {e}", file.display())))?;
        let spec: Spec =
            serde_json::from_slice(&text).map_err(|e| Error::invalid(format!("{}: {e}", file.display())))?;
        Self::from_spec(path, &spec).map_err(|e| match e {
            Error::Unsupported(what) => Error::Unsupported(what),
            other => Error::invalid(format!("{}: {other}", file.display())),
        })
    }

    /// Whether there is a root filesystem where the spec says. The empty folder that containerd makes in every bundle is
    /// none; one that is missing elsewhere is a mistake to be told, not none. Blocks.
    pub fn has_root(&self) -> bool {
        let is_usual = self.root == self.path.join(ROOTFS);
        !is_usual || std::fs::read_dir(&self.root).is_ok_and(|mut entries| entries.next().is_some())
    }

    fn from_spec(path: &Path, spec: &Spec) -> Result<Self> {
        let process = spec.process().as_ref().ok_or_else(|| Error::invalid("process: missing"))?;
        // A client whose image has no root filesystem may leave it out.
        let root = spec.root().as_ref();
        if !process.cwd().is_absolute() {
            return Err(Error::invalid(format!("process.cwd: {:?} is not absolute", process.cwd())));
        }
        Ok(Self {
            path: path.to_owned(),
            root: path.join(root.map_or(Path::new(ROOTFS), |root| root.path())),
            readonly: root.and_then(Root::readonly).unwrap_or(false),
            args: process.args().clone().unwrap_or_default(),
            env: environment(process)?,
            cwd: process.cwd().clone(),
            hostname: spec.hostname().clone().filter(|name| !name.is_empty()),
            namespaces: namespaces(spec),
            limits: Limits::of(spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()))?,
            role: Role::of(spec.annotations().as_ref().unwrap_or(&HashMap::new())),
            annotations: spec.annotations().clone().unwrap_or_default(),
            hosts: source_of(spec, "/etc/hosts"),
            resolv_conf: source_of(spec, "/etc/resolv.conf"),
            mounts: spec.mounts().clone().unwrap_or_default(),
            terminal: process.terminal() == Some(true),
            user: user(process),
        })
    }
}

/// Of the last mount there, which is in front.
fn source_of(spec: &Spec, destination: &str) -> Option<PathBuf> {
    let mut mounts = spec.mounts().iter().flatten().rev();
    mounts.find(|mount| mount.destination() == Path::new(destination))?.source().clone()
}

fn user(process: &Process) -> User {
    let user = process.user();
    User::new(user.uid(), user.gid(), user.additional_gids().as_deref().unwrap_or_default(), user.umask())
}

fn environment(process: &Process) -> Result<Vec<(String, String)>> {
    let pairs = process.env().iter().flatten();
    pairs
        .map(|pair| match pair.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
            _ => Err(Error::invalid(format!("process.env: {pair:?} is not of the form NAME=value"))),
        })
        .collect()
}

fn namespaces(spec: &Spec) -> Namespaces {
    let mut found = Namespaces::default();
    let listed = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    for namespace in listed.into_iter().flatten() {
        let slot = match namespace.typ() {
            LinuxNamespaceType::Network => &mut found.network,
            LinuxNamespaceType::Ipc => &mut found.ipc,
            LinuxNamespaceType::Uts => &mut found.uts,
            // The daemon's own mount namespace holds the mounts; wasm has no processes, users, cgroups or clocks to
            // separate.
            LinuxNamespaceType::Mount
            | LinuxNamespaceType::Pid
            | LinuxNamespaceType::User
            | LinuxNamespaceType::Cgroup
            | LinuxNamespaceType::Time => continue,
        };
        *slot = match namespace.path() {
            Some(path) if !path.as_os_str().is_empty() => Namespace::Join(path.clone()),
            _ => Namespace::New,
        };
    }
    found
}

#[cfg(test)]
impl Bundle {
    /// Of a container that asks for nothing.
    pub fn for_tests() -> Self {
        Self {
            path: "/".into(),
            root: "/".into(),
            readonly: false,
            args: Vec::new(),
            env: Vec::new(),
            cwd: "/".into(),
            hostname: None,
            namespaces: Namespaces::default(),
            limits: Limits::default(),
            annotations: HashMap::new(),
            role: Role::Alone,
            hosts: None,
            resolv_conf: None,
            mounts: Vec::new(),
            terminal: false,
            user: User::new(0, 0, &[], None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Bundle> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), json).unwrap();
        Bundle::load(dir.path())
    }

    const PROCESS: &str = r#""process":{"user":{"uid":0,"gid":0},"cwd":"/","args":["/a.wasm"]"#;

    #[test]
    fn a_minimal_spec_is_enough() {
        let bundle = parse(&format!(r#"{{"ociVersion":"1.0.2","root":{{"path":"rootfs"}},{PROCESS}}}}}"#)).unwrap();
        assert_eq!(bundle.args, ["/a.wasm"]);
        assert!(bundle.root.ends_with("rootfs"));
        assert!(!bundle.readonly);
        assert_eq!(bundle.namespaces, Namespaces::default());
        assert_eq!(bundle.limits, Limits::default());
    }

    #[test]
    fn neither_a_root_nor_arguments_are_needed() {
        let dir = tempfile::tempdir().unwrap();
        let spec = r#"{"ociVersion":"1.0.2","process":{"user":{"uid":0,"gid":0},"cwd":"/"}}"#;
        std::fs::write(dir.path().join("config.json"), spec).unwrap();
        let bundle = Bundle::load(dir.path()).unwrap();
        assert!(bundle.args.is_empty() && !bundle.has_root());
        std::fs::create_dir(dir.path().join("rootfs")).unwrap();
        assert!(!bundle.has_root());
        std::fs::write(dir.path().join("rootfs/a.wasm"), "").unwrap();
        assert!(bundle.has_root());
        assert!(Bundle { root: "/nonexistent".into(), ..bundle }.has_root());
    }

    #[test]
    fn namespaces_and_limits_are_read() {
        let bundle = parse(&format!(
            r#"{{"ociVersion":"1.0.2","root":{{"path":"/r","readonly":true}},{PROCESS}}},"linux":{{
            "namespaces":[{{"type":"network","path":"/n"}},{{"type":"uts"}},{{"type":"pid"}}],
            "resources":{{"memory":{{"limit":1048576}}}}}}}}"#
        ))
        .unwrap();
        assert_eq!(bundle.namespaces.network, Namespace::Join("/n".into()));
        assert_eq!(bundle.namespaces.uts, Namespace::New);
        assert_eq!(bundle.namespaces.ipc, Namespace::Host);
        assert_eq!(bundle.limits.memory, Some(1 << 20));
        assert!(bundle.readonly && bundle.root == Path::new("/r"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (json, words) in [
            ("{", "EOF"),
            (r#"{"ociVersion":"1.0.2"}"#, "process: missing"),
            (
                r#"{"ociVersion":"1.0.2","root":{"path":"r"},"process":{"user":{"uid":0,"gid":0},"cwd":"/","args":["a"],"env":["X"]}}"#,
                "NAME=value",
            ),
        ] {
            let error = parse(json).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("config.json"), "{error}");
        }
        assert!(Bundle::load(Path::new("/nonexistent")).unwrap_err().to_string().contains("/nonexistent/config.json"));
    }
}
