//! One program for everything a test wants a guest to do; the first argument says what.
//!
//!     exit N                  end with code N             spin                     loop for ever
//!     args                    one a line, argv[0] first   sleep SECONDS            0 = for ever, fractions allowed
//!     env                     KEY=VALUE lines, sorted     tick MS [COUNT]          see `time::tick`
//!     cwd                     the working directory       burn MS                  use the CPU that long, exit 0
//!     cat                     stdin to stdout             exit-after MS CODE       sleep, then end with CODE
//!     echo TEXT...            one line on stdout          eat BYTES                see `harm::eat`
//!     stderr TEXT...          one line on stderr          eat-politely BYTES       the same, but 77 when refused
//!     both N                  N lines to each, in turn    trap | abort | panic     three ways to the same trap
//!     write BYTES             see `streams::write`        recurse                  exhaust the stack
//!     read PATH               a file to stdout            random BYTES             hexadecimal, one line
//!     write-file PATH TEXT    replace a file              ls PATH                  names, sorted
//!     append PATH TEXT        to a file                   stat PATH                its kind and size
//!     mkdir PATH | rm PATH    a folder; that or a file    rename FROM TO | link FROM TO
//!     fill PATH BYTES         see `files::fill`           watch PATH TIMES         see `files::watch`
//!     each CMD , CMD ...      see `files::each`
//!
//! Exit codes: 0 done, 1 the host refused something (stderr says what), 2 a mistake in the arguments, else as above.
//! Output is written as it happens: nothing waits in a buffer of the guest, so what is missing was lost by the host.
mod files;
mod harm;
mod streams;
mod time;

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::process::{self, ExitCode};
use std::str::FromStr;

use realloc as _;

/// How a command ends when it does not end in its own way.
enum Failure {
    Usage(String),
    Host(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Host(error)
    }
}

type Outcome = Result<u8, Failure>;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    match run(&arguments) {
        Ok(code) => ExitCode::from(code),
        Err(Failure::Usage(message)) => {
            eprintln!("kit: {message}");
            ExitCode::from(2)
        }
        Err(Failure::Host(error)) => {
            eprintln!("kit: {}: {error}", joined(&arguments).to_string_lossy());
            ExitCode::from(1)
        }
    }
}

fn run(arguments: &[OsString]) -> Outcome {
    let (command, rest) = match arguments.split_first() {
        Some((command, rest)) => (command.to_string_lossy(), rest),
        None => return Err(Failure::Usage("no command; the header of kit/src/main.rs lists them".into())),
    };
    match command.as_ref() {
        "exit" => process::exit(number(rest, 0)?),
        "args" => streams::lines(env::args_os()),
        "env" => streams::lines(variables()),
        "cwd" => streams::lines([env::current_dir()?.into_os_string()]),
        "cat" => streams::copy(io::stdin().lock()),
        "echo" => streams::lines([joined(rest)]),
        "stderr" => streams::complain(&joined(rest)),
        "both" => streams::both(number(rest, 0)?),
        "write" => streams::write(number(rest, 0)?),
        "read" => streams::copy(fs::File::open(text(rest, 0)?)?),
        "write-file" => Ok(fs::write(text(rest, 0)?, text(rest, 1)?.as_encoded_bytes()).map(|()| 0)?),
        "ls" => files::names(text(rest, 0)?),
        "append" => files::append(text(rest, 0)?, text(rest, 1)?),
        "stat" => files::stat(text(rest, 0)?),
        "mkdir" => files::make_folder(text(rest, 0)?),
        "rm" => files::remove(text(rest, 0)?),
        "rename" => files::rename(text(rest, 0)?, text(rest, 1)?),
        "link" => files::link(text(rest, 0)?, text(rest, 1)?),
        "fill" => files::fill(text(rest, 0)?, number(rest, 1)?),
        "watch" => files::watch(text(rest, 0)?, number(rest, 1)?),
        "each" => files::each(rest),
        "random" => streams::random(number(rest, 0)?),
        "sleep" => time::sleep(number(rest, 0)?),
        "tick" => time::tick(number(rest, 0)?, optional(rest, 1)?),
        "burn" => time::burn(number(rest, 0)?),
        "exit-after" => time::exit_after(number(rest, 0)?, number(rest, 1)?),
        "eat" => harm::eat(number(rest, 0)?),
        "eat-politely" => harm::eat_politely(number(rest, 0)?),
        "spin" => harm::spin(),
        "recurse" => harm::recurse(),
        "trap" => harm::trap(),
        "abort" => process::abort(),
        "panic" => panic!("a panic on demand"),
        other => Err(Failure::Usage(format!("there is no command `{other}`"))),
    }
}

fn text(rest: &[OsString], index: usize) -> Result<&OsStr, Failure> {
    match rest.get(index) {
        Some(text) => Ok(text),
        None => Err(Failure::Usage(format!("argument {} is missing", index + 1))),
    }
}

fn number<N: FromStr>(rest: &[OsString], index: usize) -> Result<N, Failure> {
    let text = text(rest, index)?.to_string_lossy();
    text.parse().map_err(|_| Failure::Usage(format!("`{text}` is not a number that fits here")))
}

fn optional<N: FromStr>(rest: &[OsString], index: usize) -> Result<Option<N>, Failure> {
    if rest.len() > index { number(rest, index).map(Some) } else { Ok(None) }
}

fn joined(words: &[OsString]) -> OsString {
    words.join(OsStr::new(" "))
}

fn variables() -> Vec<OsString> {
    let mut lines: Vec<OsString> =
        env::vars_os().map(|pair| <[OsString; 2]>::from(pair).join(OsStr::new("="))).collect();
    lines.sort();
    lines
}
