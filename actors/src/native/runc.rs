//! The runc binary: found, run with a deadline, its errors made sentences.
//!
//! The client is the crate `runc`'s, in its blocking form: every call has a blocking thread for as long as it takes, and a
//! runc that takes too long is killed. Nothing here runs on an actor's thread.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use runc::Runc;
use runc::error::Error as RuncError;
use runc::options::GlobalOpts;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, getrlimit, pidfd_open, setrlimit};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use crate::config::RuncOptions;
use crate::error::{Error, Result};

/// A hook may load a driver; what takes longer than this hangs.
const DEADLINE: Duration = Duration::from_secs(60);

/// Of what runc says; the rest is read and dropped.
const MAX_OUTPUT: usize = 1 << 20;

/// Where the state of containers is below containerd's own, as runc's shim has it.
const STATE: &str = "runc";
const TASKS: &str = "io.containerd.runtime.v2.task";
const DEFAULT_ROOT: &str = "/run/containerd/runc";

/// How runc is called for one container: kept in its bundle, for whoever cleans up behind a lost process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    binary: String,
    root: PathBuf,
    systemd_cgroup: bool,
    id: String,
}

/// The soft limit of descriptors that this process began with: a native program gets it, not the one we raised.
static DESCRIPTORS: AtomicU64 = AtomicU64::new(0);

/// Remembers the limit of descriptors, before it is raised.
pub fn keep_descriptor_limit() {
    DESCRIPTORS.store(getrlimit(Resource::Nofile).current.unwrap_or(0), Ordering::Relaxed);
}

impl Call {
    const FILE: &str = "runc.json";

    pub fn new(bundle: &Path, namespace: &str, id: &str, options: &RuncOptions, systemd_cgroup: bool) -> Self {
        // A containerd that is not the host's has its own folder, and its ids may be the same.
        let state = bundle.ancestors().nth(2).filter(|tasks| tasks.file_name().is_some_and(|name| name == TASKS));
        let beside = state.and_then(Path::parent).map_or(DEFAULT_ROOT.into(), |state| state.join(STATE));
        Self {
            binary: options.binary.clone().unwrap_or_else(|| "runc".to_owned()),
            root: options.root.clone().unwrap_or(beside).join(namespace),
            systemd_cgroup: options.systemd_cgroup || systemd_cgroup,
            id: id.to_owned(),
        }
    }

    /// What was written into a bundle; `None` when its container is not native. Blocks.
    pub fn read(bundle: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(bundle.join(Self::FILE)).ok()?).ok()
    }

    /// Blocks.
    pub fn write(&self, bundle: &Path) -> Result<()> {
        let file = bundle.join(Self::FILE);
        let text = serde_json::to_vec(self).map_err(|e| Error::Internal(e.to_string()))?;
        std::fs::write(&file, text).map_err(|e| Error::path("write", &file, e))
    }

    /// Runs one of runc's commands. Blocks, at most until `deadline`. What runc says of a container that it makes is
    /// in `log`, because its streams are the container's.
    pub fn run<T>(
        &self,
        what: &str,
        log: Option<&Path>,
        deadline: Duration,
        command: impl FnOnce(&Runc, &str) -> runc::Result<T>,
    ) -> Result<T> {
        let mut options = GlobalOpts::new().command(&self.binary).root(&self.root).log_json();
        if let Some(log) = log {
            options = options.log(log);
        }
        options = options.systemd_cgroup(self.systemd_cgroup);
        options.custom_spawner(Arc::new(Bounded(deadline)));
        let done = options.build().and_then(|runc| command(&runc, &self.id));
        done.map_err(|error| self.explain(what, log, error))
    }

    fn explain(&self, what: &str, log: Option<&Path>, error: RuncError) -> Error {
        let why = match error {
            RuncError::NotFound => {
                return Error::Program(format!(
                    "{what}: {} is not installed. The container is a Linux program, and those run through runc: install it \
                     (Debian, Ubuntu: the package runc), or name it by the runtime option BinaryName",
                    self.binary
                ));
            }
            RuncError::CommandFailed { stderr, status, .. } => {
                let logged = log.and_then(|log| std::fs::read_to_string(log).ok()).and_then(|text| last_error(&text));
                let said = logged.or_else(|| last_error(&stderr)).unwrap_or_else(|| stderr.trim().to_owned());
                if said.is_empty() { format!("runc ended with {status}") } else { said }
            }
            other => other.to_string(),
        };
        Error::host(what, io::Error::other(why))
    }
}

/// Runs one of runc's commands on a blocking thread.
pub async fn call<T: Send + 'static>(
    runtime: &Handle,
    call: &Arc<Call>,
    what: &'static str,
    command: impl FnOnce(&Runc, &str) -> runc::Result<T> + Send + 'static,
) -> Result<T> {
    let call = Arc::clone(call);
    let done = runtime.spawn_blocking(move || call.run(what, None, DEADLINE, command));
    done.await.map_err(|e| Error::Internal(format!("{what}: {e}")))?
}

/// The same for a command that leaves a process with the streams of a container; to be run on a blocking thread.
pub fn call_logged<T>(
    call: &Call,
    what: &'static str,
    log: &Path,
    command: impl FnOnce(&Runc, &str) -> runc::Result<T>,
) -> Result<T> {
    let done = call.run(what, Some(log), DEADLINE, command);
    // Only its errors were of interest, and they have been read.
    let _ = std::fs::remove_file(log);
    done
}

/// The message of the last error among lines of JSON.
fn last_error(log: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    let lines = log.lines().rev().filter_map(|line| serde_json::from_str::<Line>(line).ok());
    lines.into_iter().find(|line| matches!(line.level.as_str(), "error" | "fatal")).map(|line| line.msg)
}

/// Runs a command to its end, or to the deadline.
#[derive(Debug)]
struct Bounded(Duration);

impl runc::Spawner for Bounded {
    fn execute(&self, mut command: Command) -> runc::Result<(ExitStatus, u32, String, String)> {
        restore_descriptor_limit(&mut command);
        let mut child = command.spawn().map_err(RuncError::ProcessSpawnFailed)?;
        // It holds the container's ends of the streams.
        drop(command);
        let ended = wait(&mut child, Instant::now() + self.0);
        if ended.is_err() {
            let _ = child.kill();
        }
        let status = child.wait().map_err(RuncError::InvalidCommand)?;
        let (stdout, stderr) = ended.map_err(RuncError::InvalidCommand)?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((status, child.id(), text(stdout), text(stderr)))
    }
}

fn restore_descriptor_limit(command: &mut Command) {
    let current = DESCRIPTORS.load(Ordering::Relaxed);
    if current == 0 {
        return;
    }
    let maximum = getrlimit(Resource::Nofile).maximum;
    let restore = move || Ok(setrlimit(Resource::Nofile, Rlimit { current: Some(current), maximum })?);
    // SAFETY: between fork and exec only a system call is made, by a function that neither allocates nor locks.
    unsafe { command.pre_exec(restore) };
}

/// Waits for the end of a process and reads what it says meanwhile. The end is what counts: children of it may hold the
/// pipes open.
fn wait(child: &mut Child, deadline: Instant) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    for fd in stdout.iter().map(|pipe| pipe.as_fd()).chain(stderr.iter().map(|pipe| pipe.as_fd())) {
        rustix::io::ioctl_fionbio(fd, true)?;
    }
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
        fds.extend(stdout.iter().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        fds.extend(stderr.iter().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        let left = deadline.saturating_duration_since(Instant::now());
        let ended = match poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "runc took too long and was killed")),
            Ok(_) => !fds[0].revents().is_empty(),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        if stdout.as_mut().is_some_and(|pipe| !listen(pipe, &mut out)) {
            stdout = None;
        }
        if stderr.as_mut().is_some_and(|pipe| !listen(pipe, &mut err)) {
            stderr = None;
        }
        if ended {
            return Ok((out, err));
        }
    }
}

/// Reads what is there; false at the end.
fn listen(pipe: &mut impl io::Read, said: &mut Vec<u8>) -> bool {
    let mut chunk = [0; 16 << 10];
    loop {
        match pipe.read(&mut chunk) {
            Ok(0) => return false,
            Ok(read) if said.len() < MAX_OUTPUT => said.extend_from_slice(&chunk[..read]),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_lies_beside_containerds_own() {
        let options = RuncOptions::default();
        let root = |bundle: &str| Call::new(Path::new(bundle), "k8s.io", "c", &options, false).root;
        assert_eq!(
            root("/run/containerd/io.containerd.runtime.v2.task/k8s.io/c"),
            Path::new("/run/containerd/runc/k8s.io")
        );
        assert_eq!(root("/tmp/x/io.containerd.runtime.v2.task/k8s.io/c"), Path::new("/tmp/x/runc/k8s.io"));
        assert_eq!(root("/tmp/b/c"), Path::new("/run/containerd/runc/k8s.io"));
        let options = RuncOptions { root: Some("/r".into()), ..RuncOptions::default() };
        assert_eq!(Call::new(Path::new("/b"), "n", "c", &options, true).root, Path::new("/r/n"));
    }

    #[test]
    fn a_call_is_found_again_in_its_bundle() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Call::read(dir.path()), None);
        let call = Call::new(dir.path(), "ns", "c", &RuncOptions::default(), true);
        call.write(dir.path()).unwrap();
        assert_eq!(Call::read(dir.path()), Some(call));
    }

    fn call_of(script: &str, deadline: Duration) -> Result<u32> {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let binary = dir.path().join("runc");
        std::fs::write(&binary, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).unwrap();
        let options = RuncOptions { binary: Some(binary.display().to_string()), ..RuncOptions::default() };
        let call = Call::new(dir.path(), "ns", "c", &options, false);
        call.run("start it", None, deadline, |runc, id| runc.start(id).map(|response| response.pid))
    }

    #[test]
    fn what_runc_says_is_the_error() {
        let long = Duration::from_secs(30);
        assert!(call_of("exit 0", long).unwrap() > 0);
        let said =
            r#"echo '{"level":"warning","msg":"odd"}' >&2; echo '{"level":"error","msg":"no such thing"}' >&2; exit 1"#;
        assert_eq!(call_of(said, long).unwrap_err().to_string(), "start it: no such thing");
        assert_eq!(call_of("echo plain >&2; exit 3", long).unwrap_err().to_string(), "start it: plain");
        assert!(call_of("exit 3", long).unwrap_err().to_string().contains("runc ended with exit status: 3"));
        // A child that keeps the streams is not waited for.
        assert!(call_of("sleep 30 & exit 0", long).is_ok());
    }

    #[test]
    fn a_stuck_runc_is_killed() {
        let began = Instant::now();
        let error = call_of("sleep 60", Duration::from_millis(200)).unwrap_err().to_string();
        assert!(error.contains("took too long") && began.elapsed() < Duration::from_secs(20), "{error}");
    }

    #[test]
    fn a_missing_runc_is_a_package_to_install() {
        let options = RuncOptions { binary: Some("/nonexistent/runc".into()), ..RuncOptions::default() };
        let call = Call::new(Path::new("/"), "ns", "c", &options, false);
        let error = call.run("start", None, DEADLINE, |runc, id| runc.start(id)).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/runc is not installed") && error.contains("package runc"), "{error}");
    }
}
