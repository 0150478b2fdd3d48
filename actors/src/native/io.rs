//! The streams of a native process: pipes or a terminal, copied to and from containerd's FIFOs.
//!
//! ```text
//!   process ── pipe ─────▶ outward ──▶ Output ──▶ FIFO       two of them without a terminal
//!   process ◀── pipe ──── inward ◀─── Input ◀─── FIFO        its end closes the pipe
//!   process ◀─▶ terminal ── one outward, one inward on its master
//! ```
//! What a process wrote before it ended is in its pipe by then, so output is complete when a read finds nothing more,
//! also if others still hold the pipe. Their words are copied on until the process is deleted.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt as _, Interest};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Result};
use crate::stdio::{Input, Keeper, Output, Reader, Stdio, StdioPaths, finish, watched};

/// A reader that takes nothing for so long is not waited for any more: it must not keep an exit from being told.
const PATIENCE: Duration = Duration::from_secs(3);

const CHUNK: usize = 64 << 10;

/// The streams before their process exists.
#[derive(Debug)]
pub struct Wiring {
    stdio: Stdio,
    ends: Ends,
}

#[derive(Debug)]
enum Ends {
    Pipes {
        ours: Box<Ours>,
        theirs: Arc<Theirs>,
    },
    /// Where runc hands the terminal over.
    Terminal {
        listener: UnixListener,
        bundle: OwnedFd,
        name: String,
    },
}

/// Our ends of the pipes.
#[derive(Debug, Default)]
struct Ours {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// The process's.
#[derive(Debug, Default)]
pub struct Theirs {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// The streams of a process that exists, before they are copied.
#[derive(Debug)]
pub struct Wired {
    stdio: Stdio,
    ours: Ours,
    /// The terminal's master.
    console: Option<OwnedFd>,
}

impl Wiring {
    /// Opens containerd's ends and makes the process's. `name` is for files in the bundle. Blocks.
    ///
    /// # Errors
    /// As [`Stdio::open_any`].
    pub fn make(bundle: &Path, name: &str, paths: &StdioPaths) -> Result<Self> {
        let stdio = Stdio::open_any(paths)?;
        let ends = if paths.terminal { terminal(bundle, name)? } else { pipes(paths)? };
        Ok(Self { stdio, ends })
    }

    /// For runc: the streams, when there is no terminal.
    pub fn io(&self) -> Option<Arc<dyn runc::Io>> {
        match &self.ends {
            Ends::Pipes { theirs, .. } => Some(Arc::clone(theirs) as Arc<dyn runc::Io>),
            Ends::Terminal { .. } => None,
        }
    }

    /// For runc: where it is to send the terminal.
    pub fn console_socket(&self) -> Option<PathBuf> {
        match &self.ends {
            Ends::Pipes { .. } => None,
            Ends::Terminal { bundle, name, .. } => Some(through(bundle, name)),
        }
    }

    /// When runc is done. Blocks shortly.
    ///
    /// # Errors
    /// `Host` when it has sent no terminal.
    pub fn connect(self) -> Result<Wired> {
        let Self { stdio, ends } = self;
        match ends {
            Ends::Pipes { ours, .. } => Ok(Wired { stdio, ours: *ours, console: None }),
            Ends::Terminal { listener, bundle, name } => {
                let received = receive(&listener).map_err(|e| Error::host("take the terminal from runc", e));
                // It lies in the bundle and goes with it; a second terminal has another name.
                let _ = std::fs::remove_file(through(&bundle, &name));
                Ok(Wired { stdio, ours: Ours::default(), console: Some(received?) })
            }
        }
    }
}

fn pipes(paths: &StdioPaths) -> Result<Ends> {
    let pipe = |wanted: &str| -> Result<Option<(OwnedFd, OwnedFd)>> {
        let made = || pipe_with(PipeFlags::CLOEXEC).map_err(|e| Error::host("make a pipe", e));
        (!wanted.is_empty()).then(made).transpose()
    };
    let (mut ours, mut theirs) = (Ours::default(), Theirs::default());
    if let Some((read, write)) = pipe(&paths.stdin)? {
        (theirs.stdin, ours.stdin) = (Some(read), Some(write));
    }
    if let Some((read, write)) = pipe(&paths.stdout)? {
        (ours.stdout, theirs.stdout) = (Some(read), Some(write));
    }
    if let Some((read, write)) = pipe(&paths.stderr)? {
        (ours.stderr, theirs.stderr) = (Some(read), Some(write));
    }
    Ok(Ends::Pipes { ours: Box::new(ours), theirs: Arc::new(theirs) })
}

/// The path of a bundle may be longer than a socket's may: it is named through a descriptor of ours.
fn through(bundle: &OwnedFd, name: &str) -> PathBuf {
    format!("/proc/{}/fd/{}/{name}", std::process::id(), bundle.as_raw_fd()).into()
}

fn terminal(bundle: &Path, name: &str) -> Result<Ends> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let bundle = open(bundle, flags, Mode::empty()).map_err(|e| Error::path("open", bundle, e))?;
    let name = format!("{name}.pty");
    let path = through(&bundle, &name);
    // Left by one that did not come off.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(|e| Error::path("listen on", &path, e))?;
    listener.set_nonblocking(true).map_err(|e| Error::path("listen on", &path, e))?;
    Ok(Ends::Terminal { listener, bundle, name })
}

/// runc has connected and sent before it ended.
fn receive(listener: &UnixListener) -> io::Result<OwnedFd> {
    let (stream, _) = listener.accept()?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut text = [0; 4096];
    recvmsg(&stream, &mut [io::IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let rights = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    rights.ok_or_else(|| io::Error::other("its message has no descriptor"))
}

impl runc::Io for Theirs {
    fn set(&self, command: &mut Command) -> io::Result<()> {
        let or_null = |fd: &Option<OwnedFd>| match fd {
            Some(fd) => fd.try_clone().map(std::process::Stdio::from),
            None => Ok(std::process::Stdio::null()),
        };
        command.stdin(or_null(&self.stdin)?).stdout(or_null(&self.stdout)?).stderr(or_null(&self.stderr)?);
        Ok(())
    }

    /// Ours are dropped with the last reference.
    fn close_after_start(&self) {}
}

impl Wired {
    /// What `CloseIO` pulls.
    pub fn stdin_keeper(&self) -> Option<Keeper> {
        self.stdio.stdin_keeper()
    }

    /// The terminal's master once more, for its size.
    pub fn console(&self) -> io::Result<Option<OwnedFd>> {
        self.console.as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// Begins to copy, on the runtime of the caller. `closing` ends it whatever is left.
    ///
    /// # Errors
    /// When the runtime cannot watch a descriptor.
    pub fn copy(self, closing: &CancellationToken) -> io::Result<Copies> {
        let Self { stdio, ours, console } = self;
        let streams = stdio.attach()?;
        let (ended, told) = watch::channel(false);
        let mut outputs = Vec::new();
        let mut out = |source: OwnedFd, output: Arc<Output>| -> io::Result<()> {
            rustix::io::ioctl_fionbio(&source, true)?;
            let source = watched(source, Interest::READABLE).map_err(|e| e.into_parts().1)?;
            let (complete, completed) = watch::channel(false);
            let copy = Outward { source, output, ended: told.clone(), complete };
            drop(tokio::spawn(copy.run(closing.clone())));
            outputs.push(completed);
            Ok(())
        };
        let stdin = match &console {
            Some(master) => {
                out(master.try_clone()?, Arc::clone(&streams.stdout))?;
                Some(master.try_clone()?)
            }
            None => {
                ours.stdout.map(|pipe| out(pipe, Arc::clone(&streams.stdout))).transpose()?;
                ours.stderr.map(|pipe| out(pipe, Arc::clone(&streams.stderr))).transpose()?;
                ours.stdin
            }
        };
        if let (Some(input), Some(sink)) = (streams.stdin, stdin) {
            rustix::io::ioctl_fionbio(&sink, true)?;
            let sink = watched(sink, Interest::WRITABLE).map_err(|e| e.into_parts().1)?;
            let (mut told, closing) = (told, closing.clone());
            drop(tokio::spawn(async move {
                tokio::select! {
                    _ = inward(input, &sink) => {}
                    () = over(&mut told) => {}
                    () = closing.cancelled() => {}
                }
            }));
        }
        Ok(Copies { ended, outputs })
    }
}

/// What is being copied for one process.
#[derive(Debug)]
pub struct Copies {
    ended: watch::Sender<bool>,
    outputs: Vec<watch::Receiver<bool>>,
}

impl Copies {
    /// The process has ended: returns when what it wrote is in the hands of the readers, or they do not want it.
    pub async fn complete(&self) {
        self.ended.send_replace(true);
        let all = async {
            for output in &self.outputs {
                // An error means that the copy is over altogether.
                drop(output.clone().wait_for(|complete| *complete).await);
            }
        };
        if tokio::time::timeout(PATIENCE, all).await.is_err() {
            tracing::debug!("output of a native process is not read");
        }
    }
}

struct Outward {
    source: AsyncFd<OwnedFd>,
    output: Arc<Output>,
    ended: watch::Receiver<bool>,
    complete: watch::Sender<bool>,
}

impl Outward {
    async fn run(mut self, closing: CancellationToken) {
        tokio::select! {
            () = self.copy() => {}
            () = closing.cancelled() => {}
        }
        let Self { source, output, complete, .. } = self;
        // Whoever still writes to it hears that nobody listens.
        drop(source);
        finish(output).await;
        complete.send_replace(true);
    }

    /// Until the last writer is gone.
    async fn copy(&mut self) {
        let mut buffer = vec![0; CHUNK];
        let (mut ended, mut told) = (self.ended.clone(), false);
        loop {
            let news = tokio::select! {
                read = read(&self.source, &mut buffer) => Some(read),
                () = over(&mut ended), if !told => None,
            };
            let read = match news {
                Some(read) => read,
                None => {
                    told = true;
                    self.rest(&mut buffer).await
                }
            };
            match read {
                Ok(Some(length)) => self.output.put(&buffer[..length]).await,
                Ok(None) => drop(self.complete.send_replace(true)),
                Err(_the_end) => return,
            }
        }
    }

    /// Its process has ended: what is there now is the last of it. `None` when that is all; others may write on.
    async fn rest(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match rustix::io::read(self.source.get_ref(), &mut *buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => self.output.put(&buffer[..length]).await,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Returns when the process has ended, or nobody will tell.
async fn over(ended: &mut watch::Receiver<bool>) {
    drop(ended.wait_for(|ended| *ended).await);
}

/// The next bytes; an error at the end, as a terminal has it. Cancel safe.
async fn read(source: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        let mut ready = source.readable().await?;
        match ready.try_io(|source| Ok(rustix::io::read(source.get_ref(), &mut *buffer)?)) {
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(read) => return read.map(Some),
            Err(_would_block) => {}
        }
    }
}

async fn inward(input: Arc<Input>, sink: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut reader = Reader(input);
    let mut buffer = vec![0; CHUNK];
    loop {
        let read = reader.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        let mut rest = &buffer[..read];
        while !rest.is_empty() {
            let mut ready = sink.writable().await?;
            match ready.try_io(|sink| Ok(rustix::io::write(sink.as_fd(), rest)?)) {
                Ok(written) => rest = &rest[written?..],
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::time::Instant;

    use rustix::fs::{CWD, FileType, mknodat};

    use super::*;

    /// Runs a line of shell whose output goes to a FIFO; returns what is read of it, and how long the copies took.
    async fn output_of(line: &str) -> (String, Duration) {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("stdout");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let paths = StdioPaths { stdout: fifo.display().to_string(), ..StdioPaths::default() };
        let wiring = Wiring::make(dir.path(), "init", &paths).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", line]);
        wiring.io().unwrap().set(&mut command).unwrap();
        let mut child = command.spawn().unwrap();
        drop(command);
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            std::fs::File::open(fifo).unwrap().read_to_string(&mut text).unwrap();
            text
        });
        let closing = CancellationToken::new();
        let copies = wiring.connect().unwrap().copy(&closing).unwrap();
        tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap();
        let ended = Instant::now();
        copies.complete().await;
        let took = ended.elapsed();
        closing.cancel();
        (tokio::task::spawn_blocking(|| reader.join().unwrap()).await.unwrap(), took)
    }

    #[tokio::test]
    async fn output_is_complete_at_the_end_of_its_process() {
        let (text, took) = output_of("i=0; while [ $i -lt 20000 ]; do echo $i; i=$((i+1)); done").await;
        assert_eq!((text.lines().count(), text.lines().last()), (20000, Some("19999")));
        assert!(took < PATIENCE, "{took:?}");
    }

    #[tokio::test]
    async fn who_still_holds_the_pipe_is_not_waited_for() {
        let (text, took) = output_of("sleep 5 & echo said").await;
        assert_eq!(text, "said\n");
        assert!(took < PATIENCE, "{took:?}");
    }
}
