//! The daemon's log: one line an event, into the `log` FIFO of a bundle, from where containerd copies it to its own.
//!
//! Every bundle has such a FIFO, and it goes away with its container; the log goes to the newest that still takes a
//! line. Nothing here waits: a line that no FIFO takes is lost, as it would be with a logger that is not read.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{Mode, OFlags, open};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::options::LogLevel;

/// The FIFOs of the living bundles, newest first.
#[derive(Clone, Default)]
pub struct Sinks(Arc<Mutex<VecDeque<(PathBuf, OwnedFd)>>>);

impl Sinks {
    /// Uses the FIFO of `bundle` as well. A bundle without a reader (the bare binary in a test) is left out.
    pub fn attach(&self, bundle: &Path) {
        let mut sinks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if sinks.iter().any(|(known, _)| known == bundle) {
            return;
        }
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if let Ok(fifo) = open(bundle.join("log"), flags, Mode::empty()) {
            sinks.push_front((bundle.to_owned(), fifo));
        }
    }

    /// Lets go of the FIFO of `bundle`: containerd reads it to its end.
    pub fn detach(&self, bundle: &Path) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|(known, _)| known != bundle);
    }
}

/// Writes one line, which the formatter hands over whole.
pub struct Line(Sinks);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut sinks = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((_, fifo)) = sinks.front() {
            match rustix::io::write(fifo, line) {
                Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => break,
                // Its reader is gone.
                Err(_) => drop(sinks.pop_front()),
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Sinks {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(self.clone())
    }
}

/// Starts the log, at `level` or containerd's own (`debug`).
pub fn start(level: Option<LogLevel>, debug: bool) -> Sinks {
    let sinks = Sinks::default();
    let word = match level {
        Some(LogLevel::Error) => "error",
        Some(LogLevel::Warn) => "warn",
        Some(LogLevel::Info) => "info",
        Some(LogLevel::Debug) => "debug",
        Some(LogLevel::Trace) => "trace",
        None if debug => "debug",
        None => "info",
    };
    // Libraries below us have nothing to say at info that an operator could use.
    let filter = EnvFilter::new(format!("warn,troupe_actors={word},containerd_shim_wasmtime_v1={word}"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(sinks.clone());
    if log.try_init().is_err() {
        eprintln!("troupe: the log is set up already");
    }
    // A panic of ours ends no more than a task, and stderr leads nowhere: the log is where its cause can be found.
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        tracing::error!(thread = thread.name(), %panic, "a panic: please report it");
    }));
    sinks
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use rustix::fs::{CWD, FileType, mknodat};

    use super::*;

    #[test]
    fn lines_go_to_the_newest_fifo_that_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        let mut readers = Vec::new();
        for bundle in [&old, &new] {
            std::fs::create_dir(bundle).unwrap();
            mknodat(CWD, bundle.join("log"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
            let flags = OFlags::RDONLY | OFlags::NONBLOCK;
            readers.push(std::fs::File::from(open(bundle.join("log"), flags, Mode::empty()).unwrap()));
        }
        let sinks = Sinks::default();
        sinks.attach(&old);
        sinks.attach(&new);
        sinks.attach(Path::new("/nonexistent"));
        let mut newest = readers.pop().unwrap();
        sinks.make_writer().write_all(b"one\n").unwrap();
        let mut text = [0; 16];
        assert_eq!(newest.read(&mut text).unwrap(), 4);
        drop(newest);
        sinks.make_writer().write_all(b"two\n").unwrap();
        assert_eq!(readers[0].read(&mut text).unwrap(), 4);
        sinks.detach(&old);
        assert_eq!(readers[0].read(&mut text).unwrap(), 0, "detached: end of file");
        sinks.make_writer().write_all(b"three\n").unwrap();
    }
}
