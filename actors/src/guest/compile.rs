//! Compiling, seen from the daemon: one short-lived child for each module, watched by the thread that started it.
//!
//! ```text
//!   daemon thread ── memfd, sealed: the wasm ─────────▶ stdin   worker (worker.rs)
//!                 ◀─ memfd, sealed after its end ────── stdout    no privileges, no network, limited
//!                 ◀─ pipe, bounded: what went wrong ─── stderr
//! ```
//! Memory files instead of pipes: nobody can stall anybody, a killed worker leaves nothing on disk, and once sealed the
//! output cannot change between the moment it is hashed and the moment it is mapped. The worker never holds a
//! descriptor of the cache.
//!
//! Invariants. The thread that starts a worker stays until the worker is reaped: the death signal the worker asks for
//! is sent when that *thread* ends. No path leaves [`Compiler::compile`] with its worker alive.
//!
//! What the worker protects from: a module that makes the compiler eat memory or time, crash, or read files. Not from a
//! module that takes over the compiler: its output is machine code, and the daemon runs it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::LoadError;
use super::engine::Kind;
use super::worker::{self, Orders, Task};
use crate::config::Settings;
use crate::sharded::cores;

/// What one compile may cost, where its result goes, and how long it is kept at hand.
#[derive(Debug, Clone)]
pub struct CompileSettings {
    /// Folder of compiled code, root-only.
    pub cache_dir: PathBuf,
    /// How many bytes that folder may hold before the longest unused entries are evicted.
    pub cache_max_size: u64,
    /// How long one compile may take, by the clock.
    pub timeout: Duration,
    /// How much memory one compile may use, in bytes.
    pub memory: u64,
    /// Largest wasm file that is compiled, in bytes.
    pub max_module_size: u64,
    /// How many compiles at a time, in this process and, for a while, in all that share the folder.
    pub parallel: usize,
    /// How long a program stays loaded after a start, whether anybody runs it or not.
    pub linger: Duration,
    /// The executable that knows the verb `compile-worker`.
    pub worker: PathBuf,
}

impl CompileSettings {
    /// The defaults, for this folder.
    pub fn new(cache_dir: impl Into<PathBuf>) -> Self {
        Self::from(&Settings { cache_dir: cache_dir.into(), ..Settings::default() })
    }
}

impl From<&Settings> for CompileSettings {
    /// One core stays free for guests, and the worker is this very executable, even if its file has been replaced by an
    /// upgrade since.
    fn from(settings: &Settings) -> Self {
        Self {
            cache_dir: settings.cache_dir.clone(),
            cache_max_size: settings.cache_max_size,
            timeout: settings.compile_timeout,
            memory: settings.compile_memory,
            max_module_size: settings.max_module_size,
            parallel: spare_cores(),
            linger: settings.idle_timeout,
            worker: "/proc/self/exe".into(),
        }
    }
}

fn spare_cores() -> usize {
    cores().saturating_sub(1).max(1)
}

/// Starts workers and, when it is closed, ends those that are left.
pub(super) struct Compiler {
    pub(super) settings: CompileSettings,
    running: Mutex<Running>,
}

#[derive(Default)]
struct Running {
    closed: bool,
    next: u64,
    workers: HashMap<u64, Arc<OwnedFd>>,
}

impl Compiler {
    pub(super) fn new(settings: CompileSettings) -> Self {
        Self { settings, running: Mutex::default() }
    }

    /// Compiles and returns the sealed code. Blocks for as long as that takes: for blocking threads only.
    pub(super) fn compile(&self, kind: Kind, wasm: &File) -> Result<File, LoadError> {
        self.run(Task::Compile(kind), wasm)
    }

    /// Turns the text format into the binary one. Blocks.
    pub(super) fn convert(&self, text: &File) -> Result<File, LoadError> {
        self.run(Task::Convert, text)
    }

    fn run(&self, task: Task, input: &File) -> Result<File, LoadError> {
        let code = memory_file("troupe-code").map_err(system("memory for the compiled code"))?;
        let mut worker = self.start(task, input, &code).map_err(system("the compile worker cannot be started"))?;
        let end = worker.watch(Instant::now() + self.settings.timeout);
        drop(worker);
        match end {
            Ok(Some((status, said))) => self.judge(status, &said)?,
            Ok(None) => return Err(self.too_slow("by the clock")),
            Err(error) => return Err(system("the compile worker cannot be watched")(error)),
        }
        seal(&code).map_err(system("the compiled code cannot be sealed"))?;
        Ok(code)
    }

    /// Ends every worker; later compiles fail at once.
    pub(super) fn close(&self) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.closed = true;
        for pidfd in running.workers.values() {
            // It may have ended by itself this moment.
            let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
        }
    }

    fn start(&self, task: Task, input: &File, code: &File) -> io::Result<Worker<'_>> {
        let orders = Orders {
            task,
            memory: self.settings.memory,
            // All its threads together; the clock decides in practice, this ends a worker whose daemon is stuck.
            cpu: self.settings.timeout * spare_cores() as u32 + Duration::from_secs(1),
            threads: spare_cores(),
        };
        let mut input = input.try_clone()?;
        input.rewind()?;
        let child = Command::new(&self.settings.worker)
            .arg0("troupe-compile-worker")
            .arg(worker::VERB)
            .env_clear()
            .envs(orders.to_environment())
            .stdin(input)
            .stdout(code.try_clone()?)
            .stderr(Stdio::piped())
            .spawn()?;
        Worker::adopt(child, self)
    }

    /// What an exit of the worker means for the one who asked.
    fn judge(&self, status: ExitStatus, said: &str) -> Result<(), LoadError> {
        let memory = || {
            LoadError::too_expensive(format!(
                "compiling it takes more memory than the {} MiB that `compile_memory` allows; raise that runtime option, \
                 or build a smaller program (optimised, without debug information)",
                self.settings.memory >> 20
            ))
        };
        let out_of_memory = said.contains("memory allocation of") || said.contains("annot allocate memory");
        match (status.code(), status.signal()) {
            (Some(0), _) => Ok(()),
            (Some(worker::EXIT_MEMORY), _) => Err(memory()),
            (Some(worker::EXIT_INVALID), _) if !out_of_memory => Err(LoadError::invalid(said)),
            (_, Some(signal)) if signal == Signal::XCPU.as_raw() => {
                Err(self.too_slow("of processor time in all threads"))
            }
            (_, Some(signal)) if signal == Signal::XFSZ.as_raw() => Err(memory()),
            _ if out_of_memory => Err(memory()),
            (_, Some(signal)) if signal == Signal::KILL.as_raw() => Err(LoadError::internal(
                "the compile worker was killed with signal 9: the shim is stopping, or the machine or its cgroup is out of \
                 memory",
            )),
            _ => Err(LoadError::internal(format!("the compile worker ended with {status}: {said}"))),
        }
    }

    fn too_slow(&self, measure: &str) -> LoadError {
        LoadError::too_expensive(format!(
            "compiling it takes longer than `compile_timeout` allows ({:?} {measure}); raise that runtime option, or build a \
             smaller program",
            self.settings.timeout
        ))
    }
}

/// A living worker: registered with its compiler, killed and reaped when dropped.
struct Worker<'a> {
    child: Child,
    pidfd: Arc<OwnedFd>,
    stderr: Option<ChildStderr>,
    number: u64,
    compiler: &'a Compiler,
}

impl<'a> Worker<'a> {
    fn adopt(mut child: Child, compiler: &'a Compiler) -> io::Result<Self> {
        let stderr = child.stderr.take();
        // The number cannot have been taken by another process: the child is not reaped yet.
        let pidfd = match rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => Arc::new(pidfd),
            Err(error) => {
                child.kill().and_then(|()| child.wait()).map(drop)?;
                return Err(error.into());
            }
        };
        let (number, closed) = {
            let mut running = compiler.running.lock().unwrap_or_else(PoisonError::into_inner);
            running.next += 1;
            let number = running.next;
            running.workers.insert(number, pidfd.clone());
            (number, running.closed)
        };
        let worker = Self { child, pidfd, stderr, number, compiler };
        if closed { Err(io::Error::other("the shim is shutting down")) } else { Ok(worker) }
    }

    /// Waits for the end, reading what the worker says meanwhile. `None`: it is not done at the deadline.
    fn watch(&mut self, deadline: Instant) -> io::Result<Option<(ExitStatus, String)>> {
        let mut said = Said::default();
        if let Some(stderr) = &self.stderr {
            rustix::io::ioctl_fionbio(stderr, true)?;
        }
        loop {
            let ended = {
                let mut fds = vec![PollFd::new(&self.pidfd, PollFlags::IN)];
                fds.extend(self.stderr.iter().map(|stderr| PollFd::new(stderr, PollFlags::IN)));
                let left = deadline.saturating_duration_since(Instant::now());
                match rustix::event::poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
                    Ok(0) => return Ok(None),
                    Ok(_) => !fds[0].revents().is_empty(),
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(error) => return Err(error.into()),
                }
            };
            if self.stderr.as_mut().is_some_and(|stderr| said.listen(stderr)) {
                self.stderr = None;
            }
            if ended {
                return Ok(Some((self.child.wait()?, said.text())));
            }
        }
    }
}

impl Drop for Worker<'_> {
    fn drop(&mut self) {
        // Both do nothing for a child that was waited for; a child that is killed is gone within the `wait`.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mut running = self.compiler.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.workers.remove(&self.number);
    }
}

/// The first few kilobytes of what the worker says; the rest is read and forgotten, so that it never blocks.
#[derive(Default)]
struct Said(Vec<u8>);

impl Said {
    const MOST: usize = 4096;

    /// Takes what is there. True at its end.
    fn listen(&mut self, stderr: &mut ChildStderr) -> bool {
        let mut buffer = [0; 4096];
        loop {
            match stderr.read(&mut buffer) {
                Ok(0) => return true,
                Ok(read) => self.0.extend(buffer[..read].iter().take(Self::MOST - self.0.len())),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
            }
        }
    }

    /// One line, fit for a log and for an error message.
    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.0);
        let words: Vec<_> = text.split_whitespace().collect();
        words.join(" ").chars().filter(|c| !c.is_control()).collect()
    }
}

/// A sealed file in memory that holds these bytes: the worker's input.
pub(super) fn sealed(bytes: &[u8]) -> Result<File, LoadError> {
    let write = || {
        let mut file = memory_file("troupe-wasm")?;
        file.write_all(bytes)?;
        seal(&file)?;
        Ok(file)
    };
    write().map_err(system("memory for the compile worker's input"))
}

fn memory_file(name: &str) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    Ok(File::from(rustix::fs::memfd_create(name, flags)?))
}

/// From here on nobody can change the file, whoever else holds it.
fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    Ok(rustix::fs::fcntl_add_seals(file.as_fd(), seals)?)
}

fn system(what: &str) -> impl FnOnce(io::Error) -> LoadError {
    move |error| LoadError::internal(format!("{what}: {error}"))
}
