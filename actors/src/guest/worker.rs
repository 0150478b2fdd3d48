//! The compile worker: the child process behind the binary's hidden verb `compile-worker`.
//!
//! It reads wasm from stdin, gives up everything it does not need, compiles, writes the code to stdout and ends; or it
//! reads the text format and writes the binary one. Its orders come in the environment, which holds nothing else. stdin
//! and stdout are files in memory, stderr is a pipe for one sentence.
//!
//! Called by `main` of the binary, before any thread is started; `compile.rs` is the other side.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

use rustix::process::{Gid, Pid, Resource, Rlimit, Signal, Uid};
use rustix::thread::UnshareFlags;

use super::engine::{Kind, compiling};
use super::inspect::{Format, inspect};

/// The verb of the binary that ends up in [`compile_worker`].
pub(super) const VERB: &str = "compile-worker";
/// The module is at fault; stderr says how. Any other failure is ours.
pub(super) const EXIT_INVALID: i32 = 65;
/// The module alone is more than the memory it may use.
pub(super) const EXIT_MEMORY: i32 = 70;
const EXIT_SYSTEM: u8 = 71;
/// `nobody`, on every Linux.
const NOBODY: u32 = 65534;

/// Guests come first, but only three to one.
const NICE: i32 = 5;

/// What the daemon tells its worker.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Orders {
    pub task: Task,
    pub memory: u64,
    pub cpu: Duration,
    pub threads: usize,
}

/// What a worker makes of its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    /// Code, for this kind of engine.
    Compile(Kind),
    /// The binary format out of the text format.
    Convert,
}

impl Task {
    const CONVERT: &str = "convert";

    fn word(self) -> &'static str {
        match self {
            Self::Compile(kind) => kind.word(),
            Self::Convert => Self::CONVERT,
        }
    }

    fn from_word(word: &str) -> Option<Self> {
        if word == Self::CONVERT { Some(Self::Convert) } else { Kind::from_word(word).map(Self::Compile) }
    }

    fn of(self, input: &[u8]) -> Result<Vec<u8>, Failure> {
        match self {
            Self::Compile(kind) => compile(kind, input),
            Self::Convert => wat::parse_bytes(input)
                .map(std::borrow::Cow::into_owned)
                .map_err(|error| Failure::Invalid(error.to_string())),
        }
    }
}

const ORDERS: &str = "TROUPE_COMPILE";

impl Orders {
    pub(super) fn to_environment(&self) -> [(&'static str, String); 2] {
        let Self { task, memory, cpu, threads } = self;
        let orders = format!("{} {memory} {} {threads} {}", task.word(), cpu.as_secs().max(1), std::process::id());
        [(ORDERS, orders), ("RAYON_NUM_THREADS", threads.to_string())]
    }

    /// The orders and the process that gave them.
    fn parse(text: &str) -> Option<(Self, i32)> {
        let mut words = text.split(' ');
        let task = Task::from_word(words.next()?)?;
        let memory = words.next()?.parse().ok()?;
        let cpu = Duration::from_secs(words.next()?.parse().ok()?);
        let threads = words.next()?.parse().ok()?;
        let parent = words.next()?.parse().ok()?;
        words.next().is_none().then_some((Self { task, memory, cpu, threads }, parent))
    }
}

/// Runs the worker and returns what `main` should return.
pub fn compile_worker() -> ExitCode {
    let failure = match run() {
        Ok(()) => return ExitCode::SUCCESS,
        Err(failure) => failure,
    };
    let (code, text) = match failure {
        Failure::Invalid(text) => (EXIT_INVALID as u8, text),
        Failure::Memory => (EXIT_MEMORY as u8, String::new()),
        Failure::System(text) => (EXIT_SYSTEM, text),
    };
    // Nobody is left to tell if the pipe is gone.
    let _ = io::stderr().write_all(text.as_bytes());
    ExitCode::from(code)
}

enum Failure {
    Invalid(String),
    Memory,
    System(String),
}

fn run() -> Result<(), Failure> {
    let text = std::env::var(ORDERS).unwrap_or_default();
    let (orders, parent) = Orders::parse(&text).ok_or_else(|| {
        Failure::System(format!("`{VERB}` is started by the shim itself, not by hand ({ORDERS}={text:?})"))
    })?;
    give_up_everything(&orders, parent).map_err(|(what, error)| Failure::System(format!("{what}: {error}")))?;

    let mut wasm = Vec::new();
    io::stdin().lock().read_to_end(&mut wasm).map_err(|error| match error.kind() {
        io::ErrorKind::OutOfMemory => Failure::Memory,
        _ => Failure::System(format!("reading the module: {error}")),
    })?;
    let made = orders.task.of(&wasm)?;
    write(&made).map_err(|error| Failure::System(format!("writing the compiled code: {error}")))
}

fn compile(kind: Kind, wasm: &[u8]) -> Result<Vec<u8>, Failure> {
    let format = inspect(wasm, u64::MAX).map_err(|error| Failure::Invalid(error.to_string()))?;
    let engine = compiling(kind).map_err(|error| Failure::System(error.to_string()))?;
    let code = match format {
        Format::Module => engine.precompile_module(wasm),
        Format::Component => engine.precompile_component(wasm),
    };
    code.map_err(|error| Failure::Invalid(format!("{error:#}")))
}

/// Not through `io::stdout()`, which would look for line ends.
fn write(code: &[u8]) -> io::Result<()> {
    let mut stdout = File::from(rustix::io::dup(io::stdout())?);
    stdout.write_all(code)
}

type Step = Result<(), (&'static str, rustix::io::Errno)>;

/// From here on the process can compute, allocate up to its limit, read fd 0 and write fds 1 and 2.
fn give_up_everything(orders: &Orders, parent: i32) -> Step {
    close_inherited();
    // containerd protects its shims from the kernel's memory killer; the worker is the one to take. Best effort.
    let _ = std::fs::write("/proc/self/oom_score_adj", "500");
    limits(orders)?;
    // Politeness, not a promise: some sandboxes forbid it. Not more: behind guests that spin, 10 makes a compile take
    // ten times as long (measured), and it would run into its timeout through no fault of its own.
    let _ = rustix::process::nice(NICE);
    rustix::thread::set_no_new_privs(true).map_err(|error| ("setting no_new_privs", error))?;
    if rustix::process::geteuid().is_root() {
        leave_the_system()?;
    }
    // After the change of user, which clears it. The thread that started us waits for us, so it lives as long as we do.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| ("asking for a death signal", error))?;
    if rustix::process::getppid().map(Pid::as_raw_pid) != Some(parent) {
        return Err(("looking for the shim that started this worker", rustix::io::Errno::SRCH));
    }
    Ok(())
}

fn limits(orders: &Orders) -> Step {
    let cpu = orders.cpu.as_secs();
    // Address space beyond the data: the binary, stacks, and what the allocator reserves for each thread (64 MiB twice).
    let space = orders.memory.saturating_add((1 << 30) + orders.threads as u64 * (256 << 20));
    for (resource, limit) in [
        (Resource::Data, orders.memory),
        (Resource::As, space),
        (Resource::Fsize, orders.memory),
        (Resource::Cpu, cpu),
        (Resource::Nofile, 16),
        (Resource::Core, 0),
    ] {
        let rlimit = Rlimit { current: Some(limit), maximum: Some(limit) };
        // A limit that is lower already and may not be raised serves as well.
        let had = rustix::process::getrlimit(resource).maximum;
        if had.is_none_or(|had| had >= limit) {
            rustix::process::setrlimit(resource, rlimit).map_err(|error| ("setting a resource limit", error))?;
        }
    }
    Ok(())
}

/// Root's part: own empty namespaces, an empty root folder, and then not root any more, which drops all capabilities.
fn leave_the_system() -> Step {
    let spaces = UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: the hazard is `FILES` with several threads; it is not asked for, and there is one thread.
    unsafe { rustix::thread::unshare_unsafe(spaces) }.map_err(|error| ("leaving the host's namespaces", error))?;
    // A folder without real files: the descriptors of this process, described.
    rustix::process::chroot("/proc/self/fdinfo").map_err(|error| ("leaving the host's files", error))?;
    rustix::process::chdir("/").map_err(|error| ("leaving the host's files", error))?;
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    // These change the calling thread only, which is the only one; threads made later inherit it.
    rustix::thread::set_thread_groups(&[]).map_err(|error| ("dropping the groups", error))?;
    rustix::thread::set_thread_res_gid(group, group, group).map_err(|error| ("changing the group", error))?;
    rustix::thread::set_thread_res_uid(user, user, user).map_err(|error| ("changing the user", error))
}

/// Whatever came through `exec` by mistake (a socket of the daemon without close-on-exec) ends here.
fn close_inherited() {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return };
    let numbers: Vec<i32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok())).collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        // The folder just read is in its own list and closed by now.
        // SAFETY: the process has just started and has one thread; only 0, 1 and 2 are owned by anybody (std).
        if let Some(fd) = unsafe { open_descriptor(number) } {
            drop(fd);
        }
    }
}

/// # Safety
/// Nobody else may own this number.
unsafe fn open_descriptor(number: i32) -> Option<OwnedFd> {
    // SAFETY: the number is used for one call that fails harmlessly if it is not open.
    let open = rustix::io::fcntl_getfd(unsafe { std::os::fd::BorrowedFd::borrow_raw(number) }).is_ok();
    // SAFETY: it is open, and the caller says that nobody owns it.
    open.then(|| unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_survive_the_environment() {
        for task in [Task::Compile(Kind::Command), Task::Compile(Kind::Concurrent), Task::Convert] {
            let orders = Orders { task, memory: 1 << 30, cpu: Duration::from_secs(60), threads: 3 };
            let [(_, text), (_, threads)] = orders.to_environment();
            assert_eq!(Orders::parse(&text), Some((orders, std::process::id() as i32)));
            assert_eq!(threads, "3");
        }
    }

    #[test]
    fn other_orders_are_refused() {
        for text in ["", "command", "command 1 1 1", "command 1 1 1 1 1", "nonsense 1 1 1 1", "command -1 1 1 1"] {
            assert_eq!(Orders::parse(text), None, "{text:?}");
        }
    }
}
