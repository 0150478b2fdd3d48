//! The machine's cgroups, as the programs of a test see them: where memory is counted in version 1, or version 2.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::node::Cgroups;

const ROOT: &str = "/sys/fs/cgroup";

/// One hierarchy, and where these tests find it.
#[derive(Debug)]
pub struct Hierarchy {
    root: PathBuf,
    /// How a line of it in `/proc/<pid>/cgroup` begins, after the number.
    mark: &'static str,
}

impl Hierarchy {
    pub fn of(cgroups: Cgroups) -> Result<Self> {
        let unified = unified()?;
        match unified {
            Some(root) if cgroups == Cgroups::Unified || root == Path::new(ROOT) => Ok(Self { root, mark: "::" }),
            _ => Ok(Self { root: Path::new(ROOT).join("memory"), mark: ":memory:" }),
        }
    }

    /// The folder of a cgroup.
    pub fn folder(&self, cgroup: &str) -> PathBuf {
        self.root.join(cgroup.trim_start_matches('/'))
    }

    /// The cgroup that a process is in.
    pub fn place(&self, pid: u32) -> Result<String> {
        let table = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let place = table.lines().find_map(|line| line.split_once(self.mark));
        Ok(place.with_context(|| format!("process {pid} is in no cgroup: {table}"))?.1.to_owned())
    }

    /// Whether memory is counted in it: where version 1 has that, version 2 has not.
    pub fn counts_memory(&self) -> bool {
        let controllers = fs::read_to_string(self.root.join("cgroup.controllers"));
        controllers.is_err() || controllers.is_ok_and(|names| names.split_whitespace().any(|name| name == "memory"))
    }
}

/// Where version 2 is mounted, if it is.
fn unified() -> Result<Option<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let mount = table.lines().find(|line| line.contains(" - cgroup2 "));
    Ok(mount.and_then(|line| line.split(' ').nth(4)).map(PathBuf::from))
}

/// A cgroup that bounds how many threads the system grants one process. Dropped, it lets go of the process, into the root.
#[derive(Debug)]
pub struct Threads {
    folder: PathBuf,
    pid: u32,
}

impl Threads {
    /// No bound yet.
    pub fn of(pid: u32) -> Result<Self> {
        let root = Path::new(ROOT);
        let root = if root.join("pids").is_dir() { root.join("pids") } else { root.to_owned() };
        if root == Path::new(ROOT) {
            fs::write(root.join("cgroup.subtree_control"), "+pids").context("a cgroup that counts threads")?;
        }
        let folder = root.join(format!("troupe-threads-{pid}"));
        fs::create_dir(&folder)?;
        let threads = Self { folder, pid };
        fs::write(threads.folder.join("cgroup.procs"), pid.to_string())?;
        Ok(threads)
    }

    /// So many more than there are now, and none beyond these.
    pub fn grant(&self, more: u32) -> Result<()> {
        let now: u32 = fs::read_to_string(self.folder.join("pids.current"))?.trim().parse()?;
        Ok(fs::write(self.folder.join("pids.max"), (now + more).to_string())?)
    }

    pub fn grant_all(&self) -> Result<()> {
        Ok(fs::write(self.folder.join("pids.max"), "max")?)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // A process that is gone needs no other place.
        let _ = self.folder.parent().map(|root| fs::write(root.join("cgroup.procs"), self.pid.to_string()));
        if let Err(error) = fs::remove_dir(&self.folder) {
            eprintln!("{} stays: {error}", self.folder.display());
        }
    }
}

/// Whether there is a version 2 that the machine's containerds do not use.
pub fn is_hybrid() -> bool {
    unified().is_ok_and(|root| root.is_some_and(|root| root != Path::new(ROOT)))
}
