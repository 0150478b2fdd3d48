//! The pod's cgroup: where the process of a group `pod` belongs, so that the kernel itself limits and accounts it.
//!
//! ```text
//!  spec.linux.cgroupsPath ─▶ path below each hierarchy ─▶ mkdir, "0" into cgroup.procs     (serve, first of all)
//!                                                      ─▶ back to the root, rmdir          (leaving; delete, if killed)
//! ```
//! The sandbox's own cgroup is joined, not the pod's above it: that one has children (native containers), and cgroup v2
//! allows processes in leaves only. A kubelet limits the one above, which holds for all in it.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Hierarchies of cgroup v1 that limit or account what a process does. The others (devices, freezer, cpuset and names
/// without a controller) say nothing about a wasm guest.
const CONTROLLERS: [&str; 5] = ["memory", "cpu", "cpuacct", "pids", "blkio"];

/// How long a killed process may be on its way out, and how often that is looked at.
const DYING: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_millis(20);

/// Where the hierarchies are mounted.
const MOUNTS: &str = "/proc/self/mountinfo";

/// The process's place in a pod's cgroup.
#[derive(Debug)]
pub struct Cgroup(Vec<Place>);

/// One hierarchy's.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    root: PathBuf,
    leaf: PathBuf,
}

impl Cgroup {
    /// Moves this process, all its threads, into the cgroup that a spec names; made where it is missing.
    ///
    /// # Errors
    /// Names the folder and the kernel's refusal.
    pub fn join(path: &str) -> Result<Self> {
        let places = places(&fs::read_to_string(MOUNTS).context(MOUNTS)?, path)?;
        for place in &places {
            let named = || format!("join the pod's cgroup {}", place.leaf.display());
            fs::create_dir_all(&place.leaf).with_context(named)?;
            fs::write(place.leaf.join("cgroup.procs"), "0").with_context(named)?;
        }
        Ok(Self(places))
    }

    /// Moves this process out again and removes what is empty then.
    pub fn leave(self) {
        for place in &self.0 {
            let left = fs::write(place.root.join("cgroup.procs"), "0").and_then(|()| remove_leaf(place));
            if let Err(error) = left {
                tracing::warn!(cgroup = %place.leaf.display(), %error, "a cgroup is left behind");
            }
        }
    }
}

/// Removes what a killed process has left of the cgroup that a spec names. One that others use stays. The kernel may need a
/// moment to take the process apart, and nothing tells when it has: blocks for a second at most.
pub fn remove(path: &str) {
    let deadline = Instant::now() + DYING;
    let places = fs::read_to_string(MOUNTS).map_err(anyhow::Error::from).and_then(|table| places(&table, path));
    for place in places.unwrap_or_default() {
        while remove_leaf(&place).is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy)
            && Instant::now() < deadline
        {
            thread::sleep(RETRY);
        }
    }
}

fn remove_leaf(place: &Place) -> io::Result<()> {
    match fs::remove_dir(&place.leaf) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// The places of a cgroup in the hierarchies that a table of mounts (proc_pid_mountinfo(5)) tells of.
fn places(table: &str, path: &str) -> Result<Vec<Place>> {
    let path = relative(path)?;
    let roots = table.lines().filter_map(hierarchy);
    Ok(roots.map(|root| Place { leaf: root.join(&path), root }).collect())
}

/// Where a hierarchy that counts is mounted.
fn hierarchy(line: &str) -> Option<PathBuf> {
    let (mount, kind) = line.split_once(" - ")?;
    let mut kind = kind.split(' ');
    let counts = match kind.next()? {
        "cgroup2" => true,
        "cgroup" => kind.next_back()?.split(',').any(|option| CONTROLLERS.contains(&option)),
        _ => false,
    };
    counts.then(|| mount.split(' ').nth(4).map(PathBuf::from)).flatten()
}

/// A path below a hierarchy's root: `/kubepods/podX/ID` as it is, or systemd's `kubepods-podX.slice:cri-containerd:ID`.
fn relative(path: &str) -> Result<PathBuf> {
    let path = match path.split(':').collect::<Vec<_>>()[..] {
        [slice, prefix, name] => expand(slice).join(format!("{prefix}-{name}.scope")),
        _ => PathBuf::from(path),
    };
    let path = path.strip_prefix("/").unwrap_or(&path);
    if path.as_os_str().is_empty() || path.components().any(|part| !matches!(part, Component::Normal(_))) {
        bail!("linux.cgroupsPath: {} is not the path of a cgroup", path.display());
    }
    Ok(path.to_owned())
}

/// `a-b-c.slice` lies in `a.slice/a-b.slice` (systemd.slice(5)).
fn expand(slice: &str) -> PathBuf {
    let name = slice.strip_suffix(".slice").unwrap_or(slice);
    let ends = name.match_indices('-').map(|(end, _)| end).filter(|end| *end > 0).chain([name.len()]);
    ends.map(|end| format!("{}.slice", &name[..end])).collect()
}

/// The cgroup that a bundle's spec names.
pub fn of_bundle(bundle: &Path) -> Option<String> {
    crate::bundle::Annotations::read(bundle).ok()?.cgroup
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_a_path_are_understood() {
        for (path, below) in [
            ("/kubepods/burstable/pod1/abc", "kubepods/burstable/pod1/abc"),
            ("default/c1", "default/c1"),
            (
                "kubepods-burstable-pod1.slice:cri-containerd:abc",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope",
            ),
            ("system.slice:x:y", "system.slice/x-y.scope"),
        ] {
            assert_eq!(relative(path).unwrap(), Path::new(below), "{path}");
        }
        for wrong in ["", "/", "/a/../b", ".."] {
            assert!(relative(wrong).unwrap_err().to_string().contains("linux.cgroupsPath"), "{wrong}");
        }
    }

    #[test]
    fn hierarchies_are_found_in_both_versions() {
        let v1 = "30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:1 - cgroup cgroup rw,cpu,cpuacct\n\
            31 25 0:27 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices\n\
            32 25 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            33 25 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            34 25 0:30 / /tmp rw - tmpfs tmpfs rw\n";
        let found = places(v1, "/a/b").unwrap();
        let leaves: Vec<_> = found.iter().map(|place| place.leaf.display().to_string()).collect();
        assert_eq!(leaves, ["/sys/fs/cgroup/cpu,cpuacct/a/b", "/sys/fs/cgroup/memory/a/b"]);
        let v2 = "29 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(
            places(v2, "a").unwrap(),
            [Place { root: "/sys/fs/cgroup".into(), leaf: "/sys/fs/cgroup/a".into() }]
        );
    }
}
