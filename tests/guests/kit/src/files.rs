//! What a guest does with files and folders.
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileType};
use std::io::{self, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::streams::{self, stdout};
use crate::{Failure, Outcome};

/// How often [`watch`] looks.
const LOOK: Duration = Duration::from_millis(5);

/// What a program writes at once.
const BLOCK: usize = 64 * 1024;

pub fn append(path: &OsStr, text: &OsStr) -> Outcome {
    File::options().append(true).create(true).open(path)?.write_all(text.as_encoded_bytes())?;
    Ok(0)
}

/// `KIND SIZE` of what is there, a link not followed.
pub fn stat(path: &OsStr) -> Outcome {
    let stat = fs::symlink_metadata(path)?;
    streams::lines([OsString::from(format!("{} {}", kind(stat.file_type()), stat.len()))])
}

fn kind(kind: FileType) -> &'static str {
    match (kind.is_dir(), kind.is_file(), kind.is_symlink()) {
        (true, ..) => "folder",
        (_, true, _) => "file",
        (.., true) => "link",
        _ => "other",
    }
}

pub fn names(folder: &OsStr) -> Outcome {
    let mut names = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
    names.sort();
    streams::lines(names)
}

pub fn rename(from: &OsStr, to: &OsStr) -> Outcome {
    done(fs::rename(from, to))
}

pub fn link(from: &OsStr, to: &OsStr) -> Outcome {
    done(fs::hard_link(from, to))
}

pub fn make_folder(path: &OsStr) -> Outcome {
    done(fs::create_dir(path))
}

/// A file or an empty folder.
pub fn remove(path: &OsStr) -> Outcome {
    let is_folder = fs::symlink_metadata(path)?.is_dir();
    done(if is_folder { fs::remove_dir(path) } else { fs::remove_file(path) })
}

fn done(result: io::Result<()>) -> Outcome {
    Ok(result.map(|()| 0)?)
}

/// Writes up to so many bytes and says how many went in.
pub fn fill(path: &OsStr, bytes: usize) -> Outcome {
    let mut file = File::create(path)?;
    let mut written = 0;
    while written < bytes {
        match file.write(&[b'x'; BLOCK][..BLOCK.min(bytes - written)]) {
            Ok(count) => written += count,
            Err(error) => {
                streams::lines([OsString::from(format!("full after {written}: {error}"))])?;
                return Ok(1);
            }
        }
    }
    streams::lines([OsString::from(format!("wrote {written}"))])
}

/// A file's content whenever it is another one than before, so many times; what is missing meanwhile is waited for.
pub fn watch(path: &OsStr, mut times: usize) -> Outcome {
    let mut before = None;
    while times > 0 {
        let now = fs::read(Path::new(path)).ok();
        if now.is_some() && now != before {
            stdout().write_all(now.as_deref().unwrap_or_default())?;
            times -= 1;
            before = now;
        }
        thread::sleep(LOOK);
    }
    Ok(0)
}

/// Commands with `,` between them, whatever becomes of each: `COMMAND: ok` or `COMMAND: ERROR`, one a line.
pub fn each(commands: &[OsString]) -> Outcome {
    for command in commands.split(|word| word == ",") {
        let end = match crate::run(command) {
            Ok(0) => "ok".to_owned(),
            Ok(code) => format!("code {code}"),
            Err(Failure::Usage(message)) => message,
            Err(Failure::Host(error)) => error.to_string(),
        };
        let words = command.join(OsStr::new(" "));
        streams::lines([OsString::from(format!("{}: {end}", words.to_string_lossy()))])?;
    }
    Ok(0)
}
