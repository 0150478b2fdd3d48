//! From `start` to a daemon: reuse the group's living one, or launch it.
//!
//! ```text
//! start                                             serve (the same executable)
//!   lock, probe, bind, listen
//!   spawn ── stdin = listener, stdout = pipe ──────▶ new session, takes both, stdio becomes /dev/null
//!   unlock                                           builds everything
//!   wait ◀── "ok" or the reason ──────────────────── Ready::ok, Ready::fail
//! ```
//! The listener is bound by `start`, so from its first moment the daemon has a queue for connections and nobody has to
//! try again. Both descriptors travel as stdin and stdout: the one way to inherit them that needs no unsafe code and
//! cannot pick the wrong numbers. The daemon inherits nothing else: no environment but PATH, no directory, no terminal.
//! Called by `start` (first half) and by `main` for `serve` (second half).

use std::env;
use std::ffi::OsString;
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::net::sockopt::socket_acceptconn;
use rustix::pipe::{PipeFlags, pipe_with};
use serde::{Deserialize, Serialize};

use crate::options::Options;
use crate::socket::{self, LOCK_WAIT};

/// A daemon is ready in milliseconds; on a machine that swaps it may take seconds.
const READY_WAIT: Duration = Duration::from_secs(30);

const READY: &[u8] = b"ok";

/// An error message, not a log.
const MAX_REASON: usize = 4096;

/// Everything a daemon is told at its launch, as one JSON argument: `ps` shows it, so it holds no secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServeArgs {
    /// The socket that the inherited listener is bound to.
    pub socket: PathBuf,
    /// containerd's gRPC socket; asked only for images without a root filesystem.
    pub containerd_address: String,
    /// Where events go.
    pub ttrpc_address: String,
    /// containerd's namespace: a daemon serves one.
    pub namespace: String,
    /// For people: what this process holds.
    pub group: String,
    /// The bundle of the first container: its `log` FIFO is read by containerd. Goes away with its pod.
    pub bundle: PathBuf,
    /// Where the process belongs, in the words of the spec; none where it holds several pods.
    pub cgroup: Option<String>,
    /// containerd asked for debug output.
    pub debug: bool,
    pub options: Options,
}

/// What `serve` starts from.
#[derive(Debug)]
pub struct ServeParams {
    /// Listening already, in blocking mode, with a backlog that may hold connections.
    pub listener: UnixListener,
    /// To be answered once, when the daemon can take calls or knows that it never will.
    pub ready: Ready,
    pub args: ServeArgs,
}

/// The pipe to the `start` that waits for us. Dropped without a word it means that the daemon died.
#[derive(Debug)]
pub struct Ready(File);

/// Makes sure that a daemon listens on `args.socket`.
pub fn reuse_or_launch(args: &ServeArgs) -> Result<()> {
    let dir = args.socket.parent().context("the socket has no directory")?;
    let named = || format!("the socket directory {}", dir.display());
    socket::create_socket_dir(dir).with_context(|| format!("cannot create {}", named()))?;
    let lock = socket::lock_socket_dir(dir, LOCK_WAIT).with_context(|| format!("cannot lock {}", named()))?;
    let named = || args.socket.display().to_string();
    if socket::is_alive(&args.socket, &lock).with_context(named)? {
        return socket::touch(&args.socket, &lock).with_context(named);
    }
    let listener = socket::bind_socket(&args.socket, &lock).with_context(named)?;
    let launched = spawn(listener, args);
    drop(lock);
    let result = launched.and_then(|(child, pipe)| wait_until_ready(child, pipe));
    if result.is_err() {
        // The next start would replace it as well; nothing is left behind in the meantime.
        let _ = socket::remove_dead(&args.socket, LOCK_WAIT);
    }
    result.with_context(|| format!("cannot launch the daemon of group {}", args.group))
}

fn spawn(listener: OwnedFd, args: &ServeArgs) -> Result<(Child, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    let mut command = Command::new(executable()?);
    command.arg0("containerd-shim-wasmtime-v1").arg("serve").arg(serde_json::to_string(args)?);
    command.env_clear().envs(env::var_os("PATH").map(|path| ("PATH", path))).current_dir("/");
    // Not a process group of its own: a group leader could not make the new session that follows.
    command.stdin(Stdio::from(listener)).stdout(Stdio::from(writer)).stderr(Stdio::null());
    let child = command.spawn().context("cannot execute this binary again")?;
    // Best effort, as all shims do: the kernel should take a shim before it takes containerd.
    let _ = raise_oom_score(child.id());
    Ok((child, reader))
}

/// The installed path reads better in `ps`; when an installer has replaced the file, the link still leads to ourselves.
fn executable() -> Result<PathBuf> {
    let link = Path::new("/proc/self/exe");
    let identity = |path: &Path| fs::metadata(path).map(|metadata| (metadata.dev(), metadata.ino()));
    let myself = identity(link).context("cannot look at /proc/self/exe (is /proc mounted?)")?;
    let installed = fs::read_link(link)?;
    Ok(if identity(&installed).ok() == Some(myself) { installed } else { link.to_owned() })
}

/// containerd's own score and one more. Without this the daemon would inherit containerd's (often -999) unchanged.
fn raise_oom_score(pid: u32) -> io::Result<()> {
    let parent = fs::read_to_string(format!("/proc/{}/oom_score_adj", std::os::unix::process::parent_id()))?;
    let score: i32 = parent.trim().parse().map_err(io::Error::other)?;
    fs::write(format!("/proc/{pid}/oom_score_adj"), (score + 1).min(1000).to_string())
}

fn wait_until_ready(mut child: Child, pipe: OwnedFd) -> Result<()> {
    let answer = read_answer(pipe);
    if matches!(&answer, Ok(bytes) if bytes == READY) {
        return Ok(());
    }
    // Dead already, or not worth having: it must not come up after we have reported a failure.
    let _ = child.kill();
    let status = child.wait()?;
    match String::from_utf8_lossy(&answer?).trim() {
        "" => bail!("it died before it was ready ({status})"),
        reason => Err(anyhow!("{reason}")),
    }
}

/// All bytes until the end, or until it is clear that the daemon is ready.
fn read_answer(pipe: OwnedFd) -> Result<Vec<u8>> {
    let deadline = Instant::now() + READY_WAIT;
    let mut pipe = File::from(pipe);
    let mut answer = Vec::new();
    let mut chunk = [0; 512];
    while answer != READY && answer.len() < MAX_REASON {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        match poll(&mut [PollFd::new(&pipe, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => bail!("it was not ready within {READY_WAIT:?}"),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        match pipe.read(&mut chunk)? {
            0 => break,
            read => answer.extend_from_slice(&chunk[..read]),
        }
    }
    Ok(answer)
}

impl ServeParams {
    /// Takes over what `start` handed down. Nothing else may have used stdin or stdout before.
    pub fn inherit(arguments: &[OsString]) -> Result<Self> {
        let [json] = arguments else {
            bail!("`serve` is run by `start`, not by hand");
        };
        let args = serde_json::from_str(&json.to_string_lossy()).context("the launch arguments are not valid")?;
        let listener = io::stdin().as_fd().try_clone_to_owned()?;
        if !socket_acceptconn(&listener).unwrap_or(false) {
            bail!("stdin is not a listening socket: `serve` is run by `start`, not by hand");
        }
        // Once more, by the process that answers: SO_PEERCRED (and whoever asks it, as our tests do) names the listener.
        socket::listen_on(&listener)?;
        let ready = Ready(File::from(io::stdout().as_fd().try_clone_to_owned()?));
        detach()?;
        Ok(Self { listener: UnixListener::from(listener), ready, args })
    }
}

/// Leaves the session of whoever ran containerd, and the inherited descriptors at their numbers.
fn detach() -> Result<()> {
    rustix::process::setsid().context("cannot make a new session")?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let null = File::options().read(true).write(true).open("/dev/null").context("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    Ok(())
}

impl Ready {
    /// The daemon takes calls.
    pub fn ok(self) {
        self.tell(READY);
    }

    /// It never will; `start` fails with this text.
    pub fn fail(self, reason: impl Display) {
        self.tell(format!("{reason:#}").as_bytes());
    }

    fn tell(mut self, answer: &[u8]) {
        // Nobody listens any more when containerd has ended `start`: an idle daemon leaves by itself soon.
        let _ = self.0.write_all(&answer[..answer.len().min(MAX_REASON)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange(tell: impl FnOnce(Ready)) -> String {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        tell(Ready(File::from(writer)));
        String::from_utf8(read_answer(reader).unwrap()).unwrap()
    }

    #[test]
    fn readiness_a_reason_and_silence_are_told_apart() {
        assert_eq!(exchange(Ready::ok), "ok");
        assert_eq!(exchange(|ready| ready.fail(anyhow!("inner").context("outer"))), "outer: inner");
        assert_eq!(exchange(drop), "");
        assert_eq!(exchange(|ready| ready.fail("x".repeat(10_000))).len(), MAX_REASON);
    }

    #[test]
    fn launch_arguments_survive_the_command_line() {
        let args = ServeArgs {
            socket: "/run/s/x".into(),
            containerd_address: "/run/c.sock".into(),
            ttrpc_address: "/run/c.sock.ttrpc".into(),
            namespace: "k8s.io".into(),
            group: "namespace k8s.io/shop".into(),
            bundle: "/run/b".into(),
            cgroup: Some("/kubepods/pod1/x".into()),
            debug: true,
            options: Options::default(),
        };
        let text = serde_json::to_string(&args).unwrap();
        assert_eq!(serde_json::from_str::<ServeArgs>(&text).unwrap(), args);
    }

    #[test]
    fn serve_by_hand_is_refused() {
        assert!(ServeParams::inherit(&[]).unwrap_err().to_string().contains("`start`"));
        assert!(ServeParams::inherit(&["{}".into()]).is_err());
    }
}
