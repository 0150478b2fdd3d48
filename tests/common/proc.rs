//! What `/proc` says about processes: whose they are, what they hold, what they cost.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

/// What a process holds. Taken before and after a load, it tells what leaked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holdings {
    pub threads: usize,
    pub descriptors: usize,
    pub mounts: usize,
}

/// Every process whose program lies below `folder` or whose command line names something below it, except this one.
pub fn running_below(folder: &Path) -> Vec<u32> {
    let needle = format!("{}/", folder.display());
    let own = std::process::id();
    pids().into_iter().filter(|pid| *pid != own && belongs(*pid, &needle)).collect()
}

/// Every process whose program is `binary` (a path below the base) and whose command line contains `word`.
pub fn running(folder: &Path, word: &str) -> Vec<u32> {
    let is_ours = |pid: &u32| exe(*pid).is_some_and(|exe| exe.starts_with(folder));
    pids().into_iter().filter(is_ours).filter(|pid| cmdline(*pid).split(' ').any(|part| part == word)).collect()
}

impl Holdings {
    /// Whether nothing came on top. Less is no leak: runtimes end threads that had nothing to do for a while.
    pub fn fit_in(self, before: Self) -> bool {
        self.threads <= before.threads && self.descriptors <= before.descriptors && self.mounts <= before.mounts
    }
}

pub fn pids() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

fn belongs(pid: u32, needle: &str) -> bool {
    let by_program = exe(pid).is_some_and(|exe| exe.to_string_lossy().starts_with(needle));
    // The guard has the folder itself, without what lies below it, on its command line.
    by_program || cmdline(pid).contains(needle)
}

/// `None` for a process that is gone, a zombie or the kernel's.
pub fn exe(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// The arguments, joined by blanks; empty for a zombie.
pub fn cmdline(pid: u32) -> String {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&raw).trim_end_matches('\0').replace('\0', " ")
}

/// Whether the process exists and has not yet exited.
pub fn is_running(pid: u32) -> bool {
    exe(pid).is_some()
}

/// Mount points below `folder` in this process's (the host's) mount namespace.
pub fn mounts_below(folder: &Path) -> Result<Vec<String>> {
    Ok(mounts("self")?.into_iter().filter(|mount| Path::new(mount).starts_with(folder)).collect())
}

/// The mount points a process sees.
pub fn mounts(pid: &str) -> Result<Vec<String>> {
    let table = read(&format!("/proc/{pid}/mountinfo"))?;
    Ok(table.lines().filter_map(|line| line.split(' ').nth(4)).map(str::to_owned).collect())
}

pub fn holdings(pid: u32) -> Result<Holdings> {
    let count = |what: &str| -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{pid}/{what}")).with_context(|| format!("process {pid} is gone"))?.count())
    };
    Ok(Holdings { threads: count("task")?, descriptors: count("fd")?, mounts: mounts(&pid.to_string())?.len() })
}

/// Memory that is a process's own and no file's, in KiB: unlike `Pss` the same whoever else runs the program.
pub fn anonymous_kib(pid: u32) -> Result<u64> {
    memory_kib(pid, "Anonymous:")
}

/// How many threads of a process have this name.
pub fn threads(pid: u32, name: &str) -> Result<usize> {
    let all = fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid} is gone"))?;
    let names = all.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("comm")).ok());
    Ok(names.filter(|comm| comm.trim_end() == name).count())
}

/// A field of `smaps_rollup` (`proc_pid_smaps(5)`), in KiB; `field` with its colon.
pub fn memory_kib(pid: u32, field: &str) -> Result<u64> {
    let rollup = read(&format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup.lines().find_map(|line| line.strip_prefix(field)).context("smaps_rollup has no such field")?;
    line.trim().trim_end_matches("kB").trim().parse().with_context(|| format!("{field} is no number"))
}

/// Memory of a process that is in swap, in KiB.
pub fn swapped_kib(pid: u32) -> Result<u64> {
    memory_kib(pid, "Swap:")
}

/// Has the kernel send a process's own memory to swap, as far as it can.
pub fn page_out(pid: u32) -> Result<()> {
    let process = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).context("not a pid")?;
    let process = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty()).context("pidfd_open")?;
    for line in read(&format!("/proc/{pid}/maps"))?.lines().filter(|line| line.contains(" rw-p ")) {
        let (from, to) = line.split(' ').next().and_then(|range| range.split_once('-')).context("a range")?;
        let (from, to) = (usize::from_str_radix(from, 16)?, usize::from_str_radix(to, 16)?);
        let range = libc::iovec { iov_base: std::ptr::without_provenance_mut(from), iov_len: to - from };
        // What has gone since, or cannot go, is no matter: the caller looks at how much went.
        // SAFETY: the advice changes no contents, and the range is of another process, whose kernel checks it.
        let _ = unsafe {
            libc::syscall(libc::SYS_process_madvise, process.as_raw_fd(), &raw const range, 1, libc::MADV_PAGEOUT, 0)
        };
    }
    Ok(())
}

/// Clock ticks (10 ms) of CPU the process used so far.
pub fn cpu_ticks(pid: u32) -> Result<u64> {
    let stat = read(&format!("/proc/{pid}/stat"))?;
    // The name in brackets may hold blanks; what follows it may not. utime and stime are fields 14 and 15.
    let fields: Vec<&str> = stat.rsplit_once(") ").context("stat without a name")?.1.split(' ').collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

/// How long since boot a core was another machine's while this one wanted it (`proc_stat(5)`, `steal`).
pub fn stolen() -> Result<Duration> {
    let stat = read("/proc/stat")?;
    let ticks = stat.lines().next().and_then(|cores| cores.split_whitespace().nth(8)).context("stat without steal")?;
    Ok(Duration::from_millis(10 * ticks.parse::<u64>()?))
}

/// Paths of the Unix sockets a process has bound.
pub fn sockets(pid: u32) -> Result<Vec<PathBuf>> {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).with_context(|| format!("process {pid} is gone"))?;
    let inodes: Vec<String> = links
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|target| Some(target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let table = read(&format!("/proc/{pid}/net/unix"))?;
    let bound = table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let path = fields.get(7).filter(|path| path.starts_with('/'))?;
        inodes.iter().any(|inode| inode == fields[6]).then(|| PathBuf::from(path))
    });
    let mut bound: Vec<PathBuf> = bound.collect();
    bound.sort();
    bound.dedup();
    Ok(bound)
}

/// A FIFO that a process has open under a name with this end, opened once more to look at it.
pub fn descriptor(pid: u32, end: &str) -> Result<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let folder = format!("/proc/{pid}/fd");
    let links = fs::read_dir(&folder).with_context(|| format!("process {pid} is gone"))?;
    let is_it = |path: &PathBuf| fs::read_link(path).is_ok_and(|target| target.to_string_lossy().ends_with(end));
    let found = links.filter_map(|entry| Some(entry.ok()?.path())).find(is_it);
    let found = found.with_context(|| format!("process {pid} has no {end} open"))?;
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    fs::File::options().read(true).custom_flags(flags).open(found).context("open it")
}

/// The executable mappings of files below `folder` in a process, by path; a file mapped twice is there twice.
pub fn code_below(pid: u32, folder: &Path) -> Result<Vec<String>> {
    let maps = read(&format!("/proc/{pid}/maps"))?;
    let fields = maps.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let code = fields.filter(|fields| fields.len() > 5 && fields[1].contains('x'));
    Ok(code.map(|fields| fields[5].to_owned()).filter(|path| Path::new(path).starts_with(folder)).collect())
}

/// The process that a thread belongs to.
pub fn group_leader(thread: u32) -> Result<u32> {
    let status = read(&format!("/proc/{thread}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:")).context("no Tgid")?;
    line.trim().parse().context("Tgid is no number")
}

/// Sends a signal to a process of this run.
pub fn signal(pid: u32, signal: rustix::process::Signal) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).context("not a pid")?;
    rustix::process::kill_process(pid, signal).context("cannot send the signal")
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {path}"))
}
