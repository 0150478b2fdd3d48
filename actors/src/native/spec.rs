//! What the OCI spec of a native container says to us. All else in it is runc's business: the file goes to it unchanged.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result};

/// The few fields.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    process: Process,
    mounts: Option<Vec<Mount>>,
    linux: Option<Linux>,
    annotations: Option<std::collections::HashMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Process {
    terminal: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Mount {
    destination: PathBuf,
    source: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Linux {
    cgroups_path: Option<String>,
    namespaces: Option<Vec<Namespace>>,
}

#[derive(Debug, Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    path: Option<PathBuf>,
}

/// Where the processes of a container are numbered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pids {
    /// Apart: they end with the first of them.
    Own,
    /// With those of others: what the first leaves behind has to be killed.
    Shared,
}

const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

impl Spec {
    /// Reads `<bundle>/config.json`. Blocks.
    ///
    /// # Errors
    /// `Invalid` with the file and the cause.
    pub fn read(bundle: &Path) -> Result<Self> {
        let file = bundle.join("config.json");
        let named = |error: &dyn std::fmt::Display| Error::invalid(format!("{}: {error}", file.display()));
        let text = fs::read(&file).map_err(|e| named(&e))?;
        serde_json::from_slice(&text).map_err(|e| named(&e))
    }

    pub fn terminal(&self) -> bool {
        self.process.terminal
    }

    /// `slice:prefix:name`: the path is meant for systemd.
    pub fn is_systemd_cgroup(&self) -> bool {
        let path = self.linux.as_ref().and_then(|linux| linux.cgroups_path.as_deref()).unwrap_or_default();
        path.split(':').count() == 3 && path.split(':').next().is_some_and(|slice| slice.ends_with(".slice"))
    }

    /// The file on the host that will be at `path` in the container, if a volume brings it: folder and rest of the path.
    pub fn volume_at(&self, path: &Path) -> Option<(PathBuf, PathBuf)> {
        let mounts = self.mounts.iter().flatten().filter(|mount| mount.destination.as_path() != Path::new("/"));
        let covering = mounts.filter(|mount| path.starts_with(&mount.destination));
        let mount = covering.max_by_key(|mount| mount.destination.components().count())?;
        let source = mount.source.clone().filter(|source| source.is_absolute())?;
        let rest = path.strip_prefix(&mount.destination).ok()?;
        if rest.as_os_str().is_empty() {
            return Some((source.parent()?.to_owned(), source.file_name()?.into()));
        }
        Some((source, rest.to_owned()))
    }

    /// Whose processes this container's are numbered with.
    ///
    /// A pod of ours has no process, so the pid namespace "of the sandbox" would be the host's. That is right for a pod
    /// in the host's (`hostPID`) only, whose sandbox asks for no pid namespace.
    ///
    /// # Errors
    /// `Unsupported` for a container that would see the host's processes in place of a pod's.
    pub fn pids(&self, bundle: &Path) -> Result<Pids> {
        let namespaces = self.linux.iter().filter_map(|linux| linux.namespaces.as_ref()).flatten();
        let Some(pid) = namespaces.into_iter().find(|namespace| namespace.kind == "pid") else {
            return Ok(Pids::Shared);
        };
        let Some(path) = pid.path.as_ref().filter(|path| !path.as_os_str().is_empty()) else { return Ok(Pids::Own) };
        if is_ours(path) && self.sandbox(bundle).is_some_and(|sandbox| sandbox.has_pid_namespace()) {
            return Err(Error::Unsupported(
                "the container is to share the processes of its pod, or of a wasm container, which have none \
                 (shareProcessNamespace, or the target of a debug container); run it with a process namespace of its own"
                    .into(),
            ));
        }
        Ok(Pids::Shared)
    }

    fn sandbox(&self, bundle: &Path) -> Option<Self> {
        let id = self.annotations.as_ref()?.get(SANDBOX)?;
        let mut parts = Path::new(id).components();
        match (parts.next(), parts.next()) {
            (Some(std::path::Component::Normal(name)), None) => Self::read(&bundle.parent()?.join(name)).ok(),
            _ => None,
        }
    }

    fn has_pid_namespace(&self) -> bool {
        let namespaces = self.linux.iter().filter_map(|linux| linux.namespaces.as_ref()).flatten();
        namespaces.into_iter().any(|namespace| namespace.kind == "pid")
    }
}

/// Whether this is the pid namespace of this very process.
fn is_ours(path: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    identity(path).is_some_and(|found| identity(Path::new("/proc/self/ns/pid")) == Some(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_volume_is_found_by_the_longest_mount() {
        let spec = spec(
            r#"{"mounts":[{"destination":"/","source":"/x"},{"destination":"/a","source":"/host/a"},
            {"destination":"/a/b","source":"/host/b"},{"destination":"/run.sh","source":"/host/c/run"},
            {"destination":"/proc","source":"proc"}]}"#,
        );
        let at = |path: &str| {
            spec.volume_at(Path::new(path)).map(|(root, rest)| format!("{} {}", root.display(), rest.display()))
        };
        assert_eq!(at("/a/run.sh").unwrap(), "/host/a run.sh");
        assert_eq!(at("/a/b/c").unwrap(), "/host/b c");
        assert_eq!(at("/run.sh").unwrap(), "/host/c run");
        assert_eq!(at("/proc/1"), None);
        assert_eq!(at("/bin/sh"), None);
    }

    #[test]
    fn a_path_for_systemd_is_known_by_its_form() {
        let of = |path: &str| spec(&format!(r#"{{"linux":{{"cgroupsPath":"{path}"}}}}"#)).is_systemd_cgroup();
        assert!(of("kubepods.slice:cri-containerd:abc"));
        assert!(!of("/kubepods/abc") && !of("/a:b:c") && !of(""));
    }

    #[test]
    fn the_hosts_processes_are_shown_to_a_pod_of_the_host_only() {
        let dir = tempfile::tempdir().unwrap();
        let (member, sandbox) = (dir.path().join("m"), dir.path().join("s"));
        fs::create_dir(&sandbox).unwrap();
        let spec = |path: &str| {
            let namespace = format!(r#"{{"type":"pid","path":"{path}"}}"#);
            spec(&format!(r#"{{"annotations":{{"{SANDBOX}":"s"}},"linux":{{"namespaces":[{namespace}]}}}}"#))
        };
        let own = "/proc/self/ns/pid";
        fs::write(sandbox.join("config.json"), r#"{"linux":{"namespaces":[{"type":"pid"}]}}"#).unwrap();
        assert_eq!(spec("").pids(&member).unwrap(), Pids::Own);
        assert!(matches!(spec(own).pids(&member), Err(Error::Unsupported(_))));
        fs::write(sandbox.join("config.json"), r#"{"linux":{"namespaces":[{"type":"uts"}]}}"#).unwrap();
        assert_eq!(spec(own).pids(&member).unwrap(), Pids::Shared);
        assert_eq!(Spec::default().pids(&member).unwrap(), Pids::Shared);
    }
}
