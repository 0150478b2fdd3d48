//! The guest of the demo: says where it runs and what it was given, then works in visible steps.
//!
//!     hello [STEPS] [STEP_MS]        default: 5 steps of 1000 ms; exit code 0
//!
//! Each line is flushed, so that `kubectl logs -f` shows it when it happens. A wrong argument is an error (exit code 2)
//! and not a default: a test that misspells one must notice.
use std::env;
use std::ffi::OsStr;
use std::io::{self, Write};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use realloc as _;

fn main() -> ExitCode {
    let (steps, pause) = match (number(1, 5), number(2, 1000)) {
        (Ok(steps), Ok(ms)) => (steps, Duration::from_millis(ms)),
        (Err(wrong), _) | (_, Err(wrong)) => {
            eprintln!("hello: `{wrong}` is not a number; usage: hello [STEPS] [STEP_MS]");
            return ExitCode::from(2);
        }
    };
    match introduce().and_then(|()| work(steps, pause)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hello: stdout: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The argument at `index` as a number, or `default` where there is none.
fn number(index: usize, default: u64) -> Result<u64, String> {
    match env::args().nth(index) {
        None => Ok(default),
        Some(text) => text.parse().map_err(|_| text),
    }
}

fn introduce() -> io::Result<()> {
    line(&[b"hello from ", system().as_bytes(), b"/", env::consts::ARCH.as_bytes()])?;
    for (index, argument) in env::args_os().enumerate() {
        line(&[b"argument ", index.to_string().as_bytes(), b": ", bytes(&argument)])?;
    }
    let mut variables: Vec<_> = env::vars_os().collect();
    variables.sort();
    for (key, value) in &variables {
        line(&[b"environment ", bytes(key), b"=", bytes(value)])?;
    }
    Ok(())
}

/// The name std has for this system; Rust 1.95 still has an empty one for WASI preview 1.
fn system() -> &'static str {
    if env::consts::OS.is_empty() && cfg!(target_os = "wasi") { "wasi" } else { env::consts::OS }
}

fn work(steps: u64, pause: Duration) -> io::Result<()> {
    for step in 1..=steps {
        line(&[format!("step {step} of {steps}").as_bytes()])?;
        thread::sleep(pause);
    }
    line(&[b"done"])
}

/// One line, in one write where the host takes it whole: lines of two containers never mix in a shared terminal.
fn line(parts: &[&[u8]]) -> io::Result<()> {
    let mut text = parts.concat();
    text.push(b'\n');
    let mut stdout = io::stdout().lock();
    stdout.write_all(&text)?;
    stdout.flush()
}

fn bytes(text: &OsStr) -> &[u8] {
    text.as_encoded_bytes()
}
