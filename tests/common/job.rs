//! A child process, what it printed so far, and a wait for its end that has a deadline.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// How a command ended.
#[derive(Debug)]
pub struct Done {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Done {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The output, if it succeeded.
    pub fn success(self, what: &str) -> Result<String> {
        match self.code {
            Some(0) => Ok(self.text()),
            code => bail!("{what} ended with {code:?}: {}{}", self.text(), self.stderr),
        }
    }
}

/// What a stream delivered so far. Readers wait on it for more.
#[derive(Debug, Default)]
pub struct Collected {
    state: Mutex<Gathered>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Gathered {
    bytes: Vec<u8>,
    ended: bool,
}

impl Collected {
    /// Reads the stream to its end on a thread of its own.
    pub fn follow(mut stream: impl Read + Send + 'static) -> Arc<Self> {
        let collected = Arc::new(Self::default());
        let shared = Arc::clone(&collected);
        thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                shared.change(|gathered| gathered.bytes.extend_from_slice(&buffer[..count]));
            }
            shared.change(|gathered| gathered.ended = true);
        });
        collected
    }

    fn change(&self, change: impl FnOnce(&mut Gathered)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.more.notify_all();
    }

    /// Waits until `look` finds something in what came so far.
    pub fn wait<T>(&self, what: &str, limit: Duration, look: impl Fn(&[u8]) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + limit;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(found) = look(&state.bytes) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                let why = if state.ended { "the stream ended".into() } else { format!("waited {limit:?}") };
                bail!("{why} without {what}; so far: {}", tail(&state.bytes));
            }
            state = self.more.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until the text came.
    pub fn wait_text(&self, text: &str, limit: Duration) -> Result<()> {
        self.wait(&format!("{text:?}"), limit, |bytes| contains(bytes, text.as_bytes()).then_some(()))
    }

    /// Everything up to the stream's end.
    pub fn all(&self, limit: Duration) -> Result<Vec<u8>> {
        let deadline = Instant::now() + limit;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the output did not end within {limit:?}; so far: {}", tail(&state.bytes));
            }
            state = self.more.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(std::mem::take(&mut state.bytes))
    }

    pub fn so_far(&self) -> Vec<u8> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).bytes.clone()
    }

    pub fn text_so_far(&self) -> String {
        String::from_utf8_lossy(&self.so_far()).into_owned()
    }
}

/// A running child. Dropped, it is killed and reaped.
#[derive(Debug)]
pub struct Job {
    child: Child,
    what: String,
    pub stdin: Option<ChildStdin>,
    pub stdout: Arc<Collected>,
    pub stderr: Arc<Collected>,
}

impl Job {
    pub fn spawn(mut command: Command) -> Result<Self> {
        let what = described(&command);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot run {what}"))?;
        let stdout = Collected::follow(child.stdout.take().context("no stdout")?);
        let stderr = Collected::follow(child.stderr.take().context("no stderr")?);
        Ok(Self { stdin: child.stdin.take(), child, what, stdout, stderr })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self.stdin.as_mut().context("stdin is closed")?;
        stdin.write_all(bytes)?;
        Ok(stdin.flush()?)
    }

    /// Kills the process itself, as a user who loses the connection would.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Whether the process has ended.
    pub fn is_over(&self) -> bool {
        exited(&self.child, Duration::ZERO).unwrap_or(true)
    }

    /// Waits for the end of the process and of its output.
    pub fn finish(mut self, limit: Duration) -> Result<Done> {
        self.stdin = None;
        self.wait(limit)
    }

    /// Waits without closing its stdin.
    pub fn wait(mut self, limit: Duration) -> Result<Done> {
        let code = match exited(&self.child, limit)? {
            true => self.child.wait()?.code(),
            false => bail!(
                "{} did not end within {limit:?}; stdout: {} stderr: {}",
                self.what,
                tail(&self.stdout.so_far()),
                tail(&self.stderr.so_far())
            ),
        };
        let stdout = self.stdout.all(limit)?;
        let stderr = String::from_utf8_lossy(&self.stderr.all(limit)?).into_owned();
        Ok(Done { code, stdout, stderr })
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // Both fail where the process has ended and was reaped: then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end.
pub fn run(command: Command, limit: Duration) -> Result<Done> {
    Job::spawn(command)?.finish(limit)
}

/// Waits for the process to exit, without reaping it.
fn exited(child: &Child, limit: Duration) -> Result<bool> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("not a pid")?;
    let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(true) };
    let timeout = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    Ok(poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&timeout))? > 0)
}

fn described(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    let mut line = words.join(" ");
    line.truncate(line.floor_char_boundary(600));
    line
}

pub fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle)
}

/// The end of an output, for a failure's text.
pub fn tail(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(2000)..]).into_owned();
    if text.is_empty() { "(nothing)".into() } else { text }
}
