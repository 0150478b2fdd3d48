//! The cgroup of a native container: where it is, what its files say.
//!
//! Version 1 has a folder for each controller, version 2 one for all. The files are read as they are, names and numbers;
//! the edge knows which field of containerd's message each becomes. Reading blocks, for microseconds.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The folders of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cgroup {
    /// By controller.
    V1(HashMap<String, PathBuf>),
    V2(PathBuf),
}

/// What the files say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// The host's version is 2.
    pub unified: bool,
    numbers: HashMap<&'static str, BTreeMap<String, u64>>,
    devices: HashMap<&'static str, Vec<DeviceLine>>,
}

/// One number about one block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceLine {
    pub major: u64,
    pub minor: u64,
    /// `Read`, `rbytes`, …
    pub name: String,
    pub value: u64,
}

/// Files of version 1: controller, file.
const V1_FILES: [(&str, &str); 19] = [
    ("cpuacct", "cpuacct.usage"),
    ("cpuacct", "cpuacct.stat"),
    ("cpuacct", "cpuacct.usage_percpu"),
    ("cpu", "cpu.stat"),
    ("memory", "memory.stat"),
    ("memory", "memory.usage_in_bytes"),
    ("memory", "memory.max_usage_in_bytes"),
    ("memory", "memory.limit_in_bytes"),
    ("memory", "memory.failcnt"),
    ("memory", "memory.memsw.usage_in_bytes"),
    ("memory", "memory.memsw.max_usage_in_bytes"),
    ("memory", "memory.memsw.limit_in_bytes"),
    ("memory", "memory.memsw.failcnt"),
    ("memory", "memory.kmem.usage_in_bytes"),
    ("memory", "memory.kmem.max_usage_in_bytes"),
    ("memory", "memory.kmem.limit_in_bytes"),
    ("memory", "memory.oom_control"),
    ("pids", "pids.current"),
    ("pids", "pids.max"),
];
const V1_DEVICES: [(&str, &str); 2] =
    [("blkio", "blkio.throttle.io_service_bytes_recursive"), ("blkio", "blkio.throttle.io_serviced_recursive")];
const V2_FILES: [&str; 10] = [
    "cpu.stat",
    "memory.stat",
    "memory.current",
    "memory.max",
    "memory.peak",
    "memory.swap.current",
    "memory.swap.max",
    "memory.events",
    "pids.current",
    "pids.max",
];
const V2_DEVICES: &str = "io.stat";

impl Stats {
    /// The number called `name` in a file; that of a file with one number is called "". Zero when it is not there.
    pub fn get(&self, file: &str, name: &str) -> u64 {
        self.find(file, name).unwrap_or(0)
    }

    /// The same, when absent and zero differ.
    pub fn find(&self, file: &str, name: &str) -> Option<u64> {
        self.numbers.get(file)?.get(name).copied()
    }

    /// Whether the file is there.
    pub fn has(&self, file: &str) -> bool {
        self.numbers.contains_key(file)
    }

    /// The numbers of a file that is a list.
    pub fn list(&self, file: &str) -> Vec<u64> {
        let Some(numbers) = self.numbers.get(file) else { return Vec::new() };
        (0..numbers.len()).filter_map(|index| numbers.get(&index.to_string()).copied()).collect()
    }

    /// The lines of a file about devices.
    pub fn devices(&self, file: &str) -> &[DeviceLine] {
        self.devices.get(file).map_or(&[], Vec::as_slice)
    }
}

impl Cgroup {
    /// That of a process. Blocks.
    ///
    /// # Errors
    /// `Host` when `/proc` does not tell.
    pub fn of(pid: u32) -> Result<Self> {
        let read = |file: String| fs::read_to_string(&file).map_err(|e| Error::path("read", Path::new(&file), e));
        let (own, mounts) = (read(format!("/proc/{pid}/cgroup"))?, read("/proc/self/mountinfo".to_owned())?);
        Self::parse(&own, &mounts).ok_or_else(|| {
            Error::host(format!("find the cgroup of process {pid}"), std::io::Error::other("none is mounted"))
        })
    }

    fn parse(own: &str, mounts: &str) -> Option<Self> {
        let mut folders = HashMap::new();
        let mut unified = None;
        for line in own.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            if controllers.is_empty() {
                unified = mounted(mounts, "cgroup2", None, path);
            }
            for controller in controllers.split(',').filter(|name| !name.is_empty()) {
                if let Some(folder) = mounted(mounts, "cgroup", Some(controller), path) {
                    folders.insert(controller.to_owned(), folder);
                }
            }
        }
        // A hybrid host has both, and the limits in version 1.
        if folders.contains_key("memory") { Some(Self::V1(folders)) } else { unified.map(Self::V2) }
    }

    /// Reads all of it. Blocks.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats { unified: matches!(self, Self::V2(_)), ..Stats::default() };
        match self {
            Self::V1(folders) => {
                for (controller, file) in V1_FILES {
                    stats.read(folders.get(controller), file);
                }
                for (controller, file) in V1_DEVICES {
                    stats.read_devices(folders.get(controller), file);
                }
            }
            Self::V2(folder) => {
                for file in V2_FILES {
                    stats.read(Some(folder), file);
                }
                stats.read_devices(Some(folder), V2_DEVICES);
            }
        }
        stats
    }

    /// How many processes the kernel has killed in it for want of memory. Blocks.
    pub fn oom_kills(&self) -> u64 {
        let Some((folder, file)) = self.oom_file() else { return 0 };
        let text = fs::read_to_string(folder.join(file)).unwrap_or_default();
        numbers(&text).get("oom_kill").copied().unwrap_or(0)
    }

    /// The file that tells of them.
    pub fn oom_file(&self) -> Option<(&Path, &'static str)> {
        match self {
            Self::V1(folders) => Some((folders.get("memory")?, "memory.oom_control")),
            Self::V2(folder) => Some((folder, "memory.events")),
        }
    }
}

impl Stats {
    fn read(&mut self, folder: Option<&PathBuf>, file: &'static str) {
        if let Some(text) = folder.and_then(|folder| fs::read_to_string(folder.join(file)).ok()) {
            self.numbers.insert(file, numbers(&text));
        }
    }

    fn read_devices(&mut self, folder: Option<&PathBuf>, file: &'static str) {
        if let Some(text) = folder.and_then(|folder| fs::read_to_string(folder.join(file)).ok()) {
            self.devices.insert(file, text.lines().flat_map(device_lines).collect());
        }
    }
}

/// `name number` on each line, or numbers alone.
fn numbers(text: &str) -> BTreeMap<String, u64> {
    let number = |word: &str| if word == "max" { Some(u64::MAX) } else { word.parse().ok() };
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [value] => found.extend(number(value).map(|value| (String::new(), value))),
            [name, value] if number(name).is_none() => {
                found.extend(number(value).map(|value| (name.to_owned(), value)));
            }
            _ => {
                let list = words.iter().filter_map(|word| number(word)).enumerate();
                found.extend(list.map(|(index, value)| (index.to_string(), value)));
            }
        }
    }
    found
}

/// `8:0 Read 5` or `8:0 rbytes=5 wbytes=6`.
fn device_lines(line: &str) -> Vec<DeviceLine> {
    let mut words = line.split_whitespace();
    let device = words.next().and_then(|device| device.split_once(':'));
    let Some((Ok(major), Ok(minor))) = device.map(|(major, minor)| (major.parse(), minor.parse())) else {
        return Vec::new();
    };
    let words: Vec<&str> = words.collect();
    let pairs: Vec<(&str, &str)> = match words[..] {
        [name, value] if !name.contains('=') => vec![(name, value)],
        _ => words.iter().filter_map(|word| word.split_once('=')).collect(),
    };
    let line = |(name, value): (&str, &str)| {
        Some(DeviceLine { major, minor, name: name.to_owned(), value: value.parse().ok()? })
    };
    pairs.into_iter().filter_map(line).collect()
}

/// The folder of `path` in the file system of this kind, and controller, where it is mounted.
fn mounted(mounts: &str, kind: &str, controller: Option<&str>, path: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, point) = (mount.next()?, mount.next()?);
        let mut file_system = file_system.split(' ');
        let (found, options) = (file_system.next()?, file_system.nth(1)?);
        if found != kind || controller.is_some_and(|name| !options.split(',').any(|option| option == name)) {
            return None;
        }
        let below = Path::new(path).strip_prefix(root).ok()?;
        Some(Path::new(point).join(below))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_found_in_both_versions() {
        let mounts = "31 25 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      32 25 0:28 /docker/x /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
                      33 25 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let own = "5:memory:/a/b\n4:cpu,cpuacct:/docker/x/a\n1:name=systemd:/\n0::/a\n";
        let Some(Cgroup::V1(folders)) = Cgroup::parse(own, mounts) else { panic!("not version 1") };
        assert_eq!(folders["memory"], Path::new("/sys/fs/cgroup/memory/a/b"));
        assert_eq!(folders["cpu"], Path::new("/sys/fs/cgroup/cpu,cpuacct/a"));
        assert_eq!(Cgroup::parse("0::/a\n", mounts), Some(Cgroup::V2("/sys/fs/cgroup/unified/a".into())));
        assert_eq!(Cgroup::parse("0::/a\n", ""), None);
    }

    #[test]
    fn files_of_every_form_are_read() {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 10\nfile 20\n"),
            ("memory.events", "low 0\noom 2\noom_kill 1\n"),
            ("io.stat", "8:0 rbytes=1 wbytes=2\n8:16 rbytes=3\nodd\n"),
        ] {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let cgroup = Cgroup::V2(dir.path().to_owned());
        let stats = cgroup.stats();
        assert_eq!((stats.get("memory.current", ""), stats.get("memory.max", "")), (4096, u64::MAX));
        assert_eq!((stats.get("memory.stat", "file"), stats.find("memory.peak", "")), (20, None));
        assert_eq!(stats.devices("io.stat").len(), 3);
        assert_eq!(stats.devices("io.stat")[1].name, "wbytes");
        assert_eq!(cgroup.oom_kills(), 1);
        assert_eq!(numbers("1 2 3").len(), 3);
        assert_eq!(device_lines("8:1 Read 7")[0].value, 7);
    }
}
