//! Which process a container belongs to.
//!
//! ```text
//! kind × (containerd, its namespace) × (pod | Kubernetes namespace | —) × build × options  ── sha256 ──▶ socket name
//! ```
//! Two containers with the same key live in one daemon. Whatever must not be mixed is therefore part of the key: other
//! tenants, another containerd (its events go elsewhere), another build (an upgraded binary starts a new daemon and the
//! old one drains), other settings. containerd's own namespace is part of every key, `node` included: ids are unique
//! only inside it. Invariant: pure but for `BuildId::current`. Called by `start`.

use std::fmt::{self, Write as _};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::bundle::Annotations;
use crate::options::Options;

/// Unix sockets take 108 bytes with the closing zero on Linux, 104 elsewhere; containerd counts on the smaller.
const MAX_SOCKET_PATH: usize = 104;

/// How many pods one process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupKind {
    /// One process a pod; outside Kubernetes one a container.
    Pod,
    /// One process a Kubernetes namespace; outside Kubernetes one a containerd namespace.
    #[default]
    Namespace,
    /// One process for all pods of the node.
    Node,
}

impl GroupKind {
    /// All kinds, in the words of the configuration.
    pub const NAMES: [&str; 3] = ["pod", "namespace", "node"];
}

impl FromStr for GroupKind {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "pod" => Ok(Self::Pod),
            "namespace" => Ok(Self::Namespace),
            "node" => Ok(Self::Node),
            other => bail!("{other:?} is not a group; choose one of {}", Self::NAMES.join(", ")),
        }
    }
}

/// Names one executable file in one state.
///
/// A hash over its contents would be the pure answer and costs 30 ms for a binary of this size, at every start. Device,
/// inode, size and time of last change cost one `stat` and differ whenever an installer has put another file there.
/// They may differ without need (the same build copied twice): the price is a second process, never a wrong one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildId(String);

impl BuildId {
    /// Looks at the running executable itself, which `/proc/self/exe` names even after the file was replaced.
    pub fn current() -> Result<Self> {
        let exe = fs::metadata("/proc/self/exe").context("cannot look at /proc/self/exe (is /proc mounted?)")?;
        let (dev, ino, size) = (exe.dev(), exe.ino(), exe.size());
        Ok(Self(format!("{}:{dev}:{ino}:{size}:{}.{:09}", env!("CARGO_PKG_VERSION"), exe.mtime(), exe.mtime_nsec())))
    }
}

/// The identity of a group.
#[derive(Debug)]
pub struct GroupKey {
    kind: GroupKind,
    /// For people: what the process holds, as in `namespace k8s.io/shop`.
    description: String,
    /// The parts in a fixed order; none is left out, so no two keys can run together.
    parts: [String; 5],
}

impl GroupKey {
    /// `id` and `namespace` are containerd's, `containerd` is the address of its socket.
    pub fn new(
        (id, namespace, containerd): (&str, &str, &str),
        annotations: &Annotations,
        options: &Options,
        build: &BuildId,
    ) -> Result<Self> {
        let kind = match &annotations.group {
            Some(text) => text.parse().context("annotation troupe.dev/group")?,
            None => options.group,
        };
        let member = match kind {
            GroupKind::Pod => annotations.sandbox_id.as_deref().unwrap_or(id),
            GroupKind::Namespace => annotations.sandbox_namespace.as_deref().unwrap_or_default(),
            GroupKind::Node => "",
        };
        let description = match member {
            "" => format!("{kind} {namespace}"),
            member => format!("{kind} {namespace}/{member}"),
        };
        // The kind is already in the first part: who reaches the same kind by annotation or by option shares a process.
        let shape = serde_json::to_string(&Options { group: kind, ..options.clone() })?;
        let parts = [kind.to_string(), format!("{containerd}\n{namespace}"), member.to_owned(), build.0.clone(), shape];
        Ok(Self { kind, description, parts })
    }

    pub fn kind(&self) -> GroupKind {
        self.kind
    }

    pub fn description(&self) -> &str {
        &self.description
    }

    /// Where the group's daemon listens.
    pub fn socket(&self, dir: &Path) -> Result<PathBuf> {
        let socket = dir.join(self.hash());
        let length = socket.as_os_str().len();
        if length > MAX_SOCKET_PATH {
            bail!(
                "the socket path {} has {length} bytes, the kernel takes {MAX_SOCKET_PATH}: \
                 give containerd a shorter state directory",
                socket.display()
            );
        }
        Ok(socket)
    }

    fn hash(&self) -> String {
        let mut hasher = Sha256::new();
        for part in &self.parts {
            // The length first, so that the border between two parts cannot move.
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        hasher.finalize().iter().fold(String::with_capacity(64), |mut hex, byte| {
            // Writing into a string cannot fail.
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }
}

impl fmt::Display for GroupKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pod => "pod",
            Self::Namespace => "namespace",
            Self::Node => "node",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn annotations(sandbox: &str, namespace: &str, group: Option<&str>) -> Annotations {
        Annotations {
            sandbox_id: Some(sandbox.into()),
            sandbox_namespace: Some(namespace.into()),
            group: group.map(Into::into),
            ..Annotations::default()
        }
    }

    fn key(id: &str, annotations: &Annotations, options: &Options) -> String {
        let build = BuildId("1".into());
        GroupKey::new((id, "k8s.io", "/run/c.sock"), annotations, options, &build).unwrap().hash()
    }

    fn with(group: GroupKind) -> Options {
        Options { group, ..Options::default() }
    }

    #[test]
    fn a_namespace_shares_one_process_and_two_do_not() {
        let options = Options::default();
        let shop = key("a", &annotations("pod1", "shop", None), &options);
        assert_eq!(shop, key("b", &annotations("pod2", "shop", None), &options));
        assert_ne!(shop, key("c", &annotations("pod3", "bank", None), &options));
        assert_ne!(shop, key("d", &Annotations::default(), &options));
    }

    #[test]
    fn a_pod_is_its_sandbox_or_outside_cri_the_container() {
        let options = with(GroupKind::Pod);
        let pod = annotations("pod1", "shop", None);
        assert_eq!(key("pod1", &pod, &options), key("member", &pod, &options));
        assert_ne!(key("pod1", &pod, &options), key("pod2", &annotations("pod2", "shop", None), &options));
        assert_ne!(key("a", &Annotations::default(), &options), key("b", &Annotations::default(), &options));
    }

    #[test]
    fn a_node_is_one_process() {
        let options = with(GroupKind::Node);
        let shop = key("a", &annotations("pod1", "shop", None), &options);
        assert_eq!(shop, key("b", &annotations("pod2", "bank", None), &options));
    }

    #[test]
    fn the_annotation_wins_and_leads_to_the_same_process_as_the_option() {
        let by_option = key("a", &annotations("pod1", "shop", None), &with(GroupKind::Node));
        let by_annotation = key("a", &annotations("pod1", "shop", Some("node")), &with(GroupKind::Pod));
        assert_eq!(by_option, by_annotation);
    }

    #[test]
    fn a_wrong_annotation_is_an_error_that_names_it() {
        let wrong = annotations("pod1", "shop", Some("cluster"));
        let error = GroupKey::new(("a", "n", "s"), &wrong, &Options::default(), &BuildId("1".into())).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("troupe.dev/group") && text.contains("cluster") && text.contains("namespace"), "{text}");
    }

    #[test]
    fn whatever_must_not_mix_makes_another_group() {
        let none = Annotations::default();
        let options = Options::default();
        let slow = Options { idle_timeout: Duration::from_secs(60), ..Options::default() };
        let hash = |containerd: &str, namespace: &str, build: &str, options: &Options| {
            GroupKey::new(("a", namespace, containerd), &none, options, &BuildId(build.into())).unwrap().hash()
        };
        let base = hash("/c", "n", "1", &options);
        assert_eq!(base, hash("/c", "n", "1", &options));
        for other in [hash("/d", "n", "1", &options), hash("/c", "m", "1", &options), hash("/c", "n", "2", &options)] {
            assert_ne!(base, other);
        }
        assert_ne!(base, hash("/c", "n", "1", &slow));
    }

    #[test]
    fn a_long_socket_directory_is_refused_with_the_way_out() {
        let none = Annotations::default();
        let key = GroupKey::new(("a", "n", "s"), &none, &Options::default(), &BuildId("1".into())).unwrap();
        assert_eq!(key.socket(Path::new("/run/containerd/s")).unwrap().as_os_str().len(), 82);
        let long = format!("/{}", "x".repeat(60));
        assert!(format!("{:#}", key.socket(Path::new(&long)).unwrap_err()).contains("shorter"));
    }

    #[test]
    fn the_build_id_is_stable_within_a_process() {
        assert_eq!(BuildId::current().unwrap(), BuildId::current().unwrap());
    }
}
