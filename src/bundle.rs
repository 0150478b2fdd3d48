//! The few things `start` and `delete` need from a bundle: annotations of the spec, and the `address` file.
//!
//! `address` is how containerd 1.x finds a shim again after its own restart, and how `delete` finds the daemon of a
//! container whose connection is lost. The full spec is read by the daemon, not here: `start` has milliseconds.

use std::fs;
use std::io::{ErrorKind, Read as _};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// Specs are kilobytes; ten thousand arguments are a megabyte. What is larger is a mistake or an attack.
const MAX_SPEC: u64 = 16 << 20;

/// An address is a `unix://` and at most 104 bytes of path.
const MAX_ADDRESS: u64 = 4096;

const SCHEME: &str = "unix://";

/// The annotations that decide about the group, and where its process belongs. All else is skipped while parsing.
#[derive(Debug, Default, Deserialize)]
pub struct Annotations {
    /// The pod, in the words of CRI: the id of its sandbox container (which carries its own).
    #[serde(rename = "io.kubernetes.cri.sandbox-id")]
    pub sandbox_id: Option<String>,
    /// The Kubernetes namespace of the pod.
    #[serde(rename = "io.kubernetes.cri.sandbox-namespace")]
    pub sandbox_namespace: Option<String>,
    /// `sandbox` for the pod's anchor, `container` for its members.
    #[serde(rename = "io.kubernetes.cri.container-type")]
    pub container_type: Option<String>,
    /// Overrides the runtime option `group`.
    #[serde(rename = "troupe.dev/group")]
    pub group: Option<String>,
    /// `linux.cgroupsPath` of the spec.
    #[serde(skip)]
    pub cgroup: Option<String>,
}

impl Annotations {
    pub fn read(bundle: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Spec {
            annotations: Option<Annotations>,
            linux: Option<Linux>,
        }
        #[derive(Deserialize)]
        struct Linux {
            #[serde(rename = "cgroupsPath")]
            cgroup: Option<String>,
        }
        let path = bundle.join("config.json");
        let bytes = read_bounded(&path, MAX_SPEC)
            .with_context(|| format!("cannot read {}: `start` runs in the bundle of a container", path.display()))?;
        let spec: Spec = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is not a valid OCI runtime spec", path.display()))?;
        let cgroup = spec.linux.and_then(|linux| linux.cgroup).filter(|path| !path.is_empty());
        Ok(Self { cgroup, ..spec.annotations.unwrap_or_default() })
    }

    /// The bundle of the pod that this container is a member of: containerd keeps the bundles of a namespace side by side.
    pub fn sandbox_bundle(&self, bundle: &Path) -> Option<PathBuf> {
        let (Some("container"), Some(id)) = (self.container_type.as_deref(), self.sandbox_id.as_deref()) else {
            return None;
        };
        // An id with a path in it would lead to somebody else's file.
        let mut components = Path::new(id).components();
        match (components.next(), components.next()) {
            (Some(Component::Normal(name)), None) => Some(bundle.parent()?.join(name)),
            _ => None,
        }
    }
}

/// The socket in a bundle's `address` file; `None` when there is no such file or it holds something else.
pub fn read_address(bundle: &Path) -> Option<PathBuf> {
    let bytes = read_bounded(&bundle.join("address"), MAX_ADDRESS).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let path = PathBuf::from(text.trim().strip_prefix(SCHEME)?);
    path.is_absolute().then_some(path)
}

/// Writes the file in one step: containerd may read it at any moment.
pub fn write_address(bundle: &Path, address: &str) -> Result<()> {
    let (path, temporary) = (bundle.join("address"), bundle.join(".address"));
    fs::write(&temporary, address)
        .and_then(|()| fs::rename(&temporary, &path))
        .with_context(|| format!("cannot write {}", path.display()))
}

pub fn address_of(socket: &Path) -> String {
    format!("{SCHEME}{}", socket.display())
}

fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    // A FIFO in the place of the file would block the open; containerd writes regular files.
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_file() => bail!("it is not a regular file"),
        Err(error) if error.kind() == ErrorKind::NotFound => bail!("there is no such file"),
        other => other?,
    };
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        bail!("it is larger than {limit} bytes");
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(spec: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), spec).unwrap();
        dir
    }

    #[test]
    fn annotations_are_read_and_the_rest_is_skipped() {
        let dir = bundle(
            r#"{"ociVersion":"1.0","annotations":{"a":"b","io.kubernetes.cri.sandbox-id":"p","troupe.dev/group":"node"}}"#,
        );
        let annotations = Annotations::read(dir.path()).unwrap();
        assert_eq!((annotations.sandbox_id.as_deref(), annotations.group.as_deref()), (Some("p"), Some("node")));
        assert!(Annotations::read(bundle(r#"{"annotations":null}"#).path()).unwrap().group.is_none());
        assert!(Annotations::read(bundle("{}").path()).unwrap().group.is_none());
    }

    #[test]
    fn a_missing_or_broken_spec_is_named() {
        let empty = tempfile::tempdir().unwrap();
        assert!(format!("{:#}", Annotations::read(empty.path()).unwrap_err()).contains("config.json: `start` runs"));
        for spec in ["", "not json", "[]", r#"{"annotations":{"troupe.dev/group":5}}"#] {
            let text = format!("{:#}", Annotations::read(bundle(spec).path()).unwrap_err());
            assert!(text.contains("config.json is not a valid OCI runtime spec"), "{text}");
        }
    }

    #[test]
    fn only_members_of_a_pod_have_a_sandbox_bundle_and_only_beside_their_own() {
        let of = |kind: &str, id: &str| {
            Annotations { container_type: Some(kind.into()), sandbox_id: Some(id.into()), ..Annotations::default() }
                .sandbox_bundle(Path::new("/run/task/k8s.io/me"))
        };
        assert_eq!(of("container", "pod1"), Some("/run/task/k8s.io/pod1".into()));
        for (kind, id) in [("sandbox", "pod1"), ("container", "../../x"), ("container", "/etc"), ("container", "")] {
            assert_eq!(of(kind, id), None, "{kind} {id}");
        }
    }

    #[test]
    fn an_address_is_written_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read_address(dir.path()), None);
        write_address(dir.path(), &address_of(Path::new("/run/s/x"))).unwrap();
        assert_eq!(read_address(dir.path()), Some("/run/s/x".into()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the temporary file is gone");
        for wrong in ["", "vsock://1:2", "unix://relative", "\u{0}"] {
            fs::write(dir.path().join("address"), wrong).unwrap();
            assert_eq!(read_address(dir.path()), None, "{wrong:?}");
        }
    }
}
