//! A private containerd of one version: its own root, state, sockets and shims, found by nobody else.
//!
//! ```text
//! <base>/<name>/  config.toml  c.sock  containerd.log  root/  state/  fifo/  options.toml  cache/
//!                 bin/containerd-shim-wasmtime-v1 (what its shim processes run: it tells whose they are)
//! ```
//! Invariant: after `close` nothing of it is left, and `close` says so if there is. A containerd that is already
//! running on the machine is neither used nor touched.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::cgroup::Hierarchy;
use super::events::Events;
use super::node::{self, Cgroups, Node};
use super::{SOON, base, ctr::Client, proc, wait};

/// The versions every case runs on: what Debian's bookworm, trixie and sid ship.
pub const VERSIONS: [&str; 3] = ["1.6", "1.7", "2.1"];

/// What makes pods: it wants a network.
const OF_PODS: [&str; 5] = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.podsandbox.controller.v1.podsandbox",
    // Part of CRI since 1.7; switched off by its own setting where CRI is on.
    "io.containerd.nri.v1.nri",
];

/// Plugins that tests do not need and that would look at, or write to, the machine: `opt` writes to /opt, the rest are
/// snapshotters of file systems that are not there. Names a version does not know are ignored.
const DISABLED: [&str; 13] = [
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.restart",
    "io.containerd.monitor.container.v1.restart",
    "io.containerd.internal.v1.tracing",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.erofs",
    "io.containerd.differ.v1.erofs",
    "io.containerd.ttrpc.v1.otelttrpc",
];

/// How long the daemon stays after its last container in the tests.
pub const IDLE: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Containerd {
    pub version: &'static str,
    folder: PathBuf,
    programs: PathBuf,
    /// Where it makes pods, if it does.
    node: Option<Node>,
    daemon: Mutex<Option<Child>>,
    events: Mutex<Option<Events>>,
}

impl Containerd {
    /// Starts one in a folder `name` of the base.
    pub fn start(version: &'static str, name: &str) -> Result<Self> {
        Self::start_on(version, name, None)
    }

    /// Starts one that makes pods, in a network of its own.
    pub fn start_node(version: &'static str, name: &str, cgroups: Cgroups) -> Result<Self> {
        Self::start_on(version, name, Some(Node::create(&base::folder(name)?, cgroups)?))
    }

    fn start_on(version: &'static str, name: &str, node: Option<Node>) -> Result<Self> {
        let programs = programs(version)?;
        let folder = base::folder(name)?;
        base::link_shim(&folder.join("bin"))?;
        fs::write(folder.join("config.toml"), config(&folder, node.is_some()))?;
        let containerd = Self { version, folder, programs, node, daemon: Mutex::default(), events: Mutex::default() };
        fs::write(containerd.options(), containerd.default_options())?;
        containerd.launch()?;
        Ok(containerd)
    }

    /// The runtime options every `run` passes unless it says otherwise: nothing of the machine's is used.
    pub fn default_options(&self) -> String {
        format!("cache_dir = \"{}\"\nidle_timeout = \"{}s\"\n", self.cache().display(), IDLE.as_secs())
    }

    pub fn options(&self) -> PathBuf {
        self.folder.join("options.toml")
    }

    /// A file of them with these lines as well.
    pub fn more_options(&self, name: &str, lines: &str) -> Result<PathBuf> {
        let file = self.folder.join(format!("{name}.toml"));
        fs::write(&file, format!("{}{lines}\n", self.default_options()))?;
        Ok(file)
    }

    pub fn cache(&self) -> PathBuf {
        self.folder.join("cache")
    }

    pub fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    /// The cgroups that it sees.
    pub fn hierarchy(&self) -> Result<Hierarchy> {
        Hierarchy::of(self.node.as_ref().map_or(Cgroups::Machine, Node::cgroups))
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A client in a namespace. Containers of different namespaces are in different shim processes.
    pub fn namespace(&self, namespace: &str) -> Client<'_> {
        Client::new(self, namespace)
    }

    /// `ctr` of this version, connected to this containerd.
    pub fn ctr(&self) -> Command {
        let mut command = Command::new(self.programs.join("ctr"));
        command.arg("--address").arg(self.socket());
        command
    }

    /// What happened so far. Panics of the tests' own making aside, it is there from `launch` to `stop`.
    pub fn with_events<T>(&self, use_them: impl FnOnce(&Events) -> Result<T>) -> Result<T> {
        use_them(lock(&self.events).as_ref().context("containerd is stopped: there are no events")?)
    }

    /// Starts the process and waits until it answers.
    pub fn launch(&self) -> Result<()> {
        let path = format!(
            "{}:{}:{}",
            self.folder.join("bin").display(),
            self.programs.display(),
            std::env::var("PATH").unwrap_or_default()
        );
        let log = File::options().create(true).append(true).open(self.log_file())?;
        let program = self.programs.join("containerd");
        let child = self
            .node
            .as_ref()
            .map_or_else(|| Command::new(&program), |node| node.daemon(&program))
            .arg("--config")
            .arg(self.folder.join("config.toml"))
            .env("PATH", path)
            .env("TROUPE_TEST_SECRET", "must never be seen by a guest")
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start containerd")?;
        *lock(&self.daemon) = Some(child);
        self.ready()?;
        *lock(&self.events) = Some(Events::subscribe(self)?);
        Ok(())
    }

    /// The socket listens before the services answer, so both are asked.
    fn ready(&self) -> Result<()> {
        wait::until_true("containerd to listen", SOON, || {
            if let Some(status) = lock(&self.daemon).as_mut().and_then(|child| child.try_wait().ok()?) {
                bail!("containerd {} ended at once ({status}): {}", self.version, self.log_since(0));
            }
            Ok(UnixStream::connect(self.socket()).is_ok())
        })?;
        wait::until_true("containerd to answer", SOON, || {
            Ok(self.ctr().arg("version").output().is_ok_and(|output| output.status.success()))
        })
    }

    /// Ends the process as the service manager would; its containers go on.
    pub fn stop(&self) -> Result<()> {
        *lock(&self.events) = None;
        let Some(mut child) = lock(&self.daemon).take() else { return Ok(()) };
        let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw).context("not a pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let ended = wait::until_true("containerd to end after SIGTERM", SOON, || Ok(child.try_wait()?.is_some()));
        if ended.is_err() {
            child.kill()?;
            child.wait()?;
        }
        ended
    }

    /// Ends it as a crash would.
    pub fn kill(&self) -> Result<()> {
        *lock(&self.events) = None;
        if let Some(mut child) = lock(&self.daemon).take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// The shim daemons of this containerd (not their short-lived `start`, `delete` and `compile` processes).
    pub fn shims(&self) -> Vec<u32> {
        proc::running(&self.folder.join("bin"), "serve")
    }

    /// Every process of the shim, of whatever kind.
    pub fn shim_processes(&self) -> Vec<u32> {
        proc::running_below(&self.folder.join("bin"))
    }

    /// The end of the log, from an offset that `log_length` returned.
    pub fn log_since(&self, offset: u64) -> String {
        let text = self.whole_log_since(offset);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// All of it from there on; the shims' own lines are part of it.
    pub fn whole_log_since(&self, offset: u64) -> String {
        let mut text = Vec::new();
        let read = File::open(self.log_file()).and_then(|mut file| {
            file.seek(SeekFrom::Start(offset))?;
            file.read_to_end(&mut text)
        });
        if let Err(error) = read {
            return format!("no log: {error}");
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    pub fn log_length(&self) -> u64 {
        fs::metadata(self.log_file()).map_or(0, |data| data.len())
    }

    /// Ends everything and names what should have ended by itself.
    pub fn close(&self) -> Result<()> {
        let idle = wait::until_true("the shims to end after their last container", IDLE + SOON, || {
            Ok(self.shim_processes().is_empty())
        });
        let left: Vec<String> = self.shim_processes().into_iter().map(proc::cmdline).collect();
        self.stop()?;
        self.node.as_ref().map_or(Ok(()), Node::remove)?;
        let mounts = proc::mounts_below(&self.folder)?;
        if idle.is_err() || !mounts.is_empty() {
            bail!("containerd {} left processes {left:?} and mounts {mounts:?}", self.version);
        }
        Ok(())
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.join("c.sock")
    }

    fn log_file(&self) -> PathBuf {
        self.folder.join("containerd.log")
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // For a case that failed half way; one that went well has called `close`.
        if let Err(error) = self.kill() {
            eprintln!("containerd {}: {error:#}", self.version);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Where the programs of a version are; `make test` puts them there.
fn programs(version: &str) -> Result<PathBuf> {
    let folder = cache_folder()?.join("containerds").join(version).join("usr/bin");
    if !folder.join("containerd").is_file() {
        bail!("containerd {version} is not in {}: run `make test`, which fetches it", folder.display());
    }
    Ok(folder)
}

/// What is fetched or built once for many runs lives outside the clone.
pub fn cache_folder() -> Result<PathBuf> {
    match std::env::var_os("TROUPE_CACHE") {
        Some(folder) => Ok(folder.into()),
        None => Ok(PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache/troupe")),
    }
}

fn config(folder: &Path, makes_pods: bool) -> String {
    let pods = if makes_pods { node::containerd_config(folder) } else { String::new() };
    let disabled: Vec<_> = DISABLED.iter().chain(OF_PODS.iter().filter(|_| !makes_pods)).collect();
    let folder = folder.display();
    format!(
        "version = 2\nroot = \"{folder}/root\"\nstate = \"{folder}/state\"\ndisabled_plugins = {disabled:?}\n\
         [grpc]\naddress = \"{folder}/c.sock\"\n[debug]\nlevel = \"info\"\n{pods}"
    )
}
