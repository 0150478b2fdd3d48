//! The text format: `.wat` becomes the binary it stands for, before anything else looks at it.
//!
//! Parsing text is work on untrusted input like compiling is, with memory and time to match, so it happens in the same
//! kind of limited process (`worker.rs`), for every container anew. One at a time: text is for trying things out, and
//! whoever starts many containers ships the binary.
//!
//! Called by whoever turns bytes into a program, on blocking threads.

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::sync::{Mutex, PoisonError};

use super::LoadError;
use super::compile::{Compiler, sealed};
use super::inspect::{self, is_wat};

/// The binary for a text; a binary is handed back as it is.
pub(super) fn to_binary(compiler: &Compiler, bytes: Vec<u8>) -> Result<Vec<u8>, LoadError> {
    static TURN: Mutex<()> = Mutex::new(());
    if !is_wat(&bytes) {
        return Ok(bytes);
    }
    let most = compiler.settings.max_module_size;
    inspect::check_size(bytes.len() as u64, most)?;
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut binary = compiler.convert(&sealed(&bytes)?)?;
    let failed = |error| LoadError::internal(format!("reading what its text stands for: {error}"));
    let size = binary.metadata().map_err(failed)?.len();
    inspect::check_size(size, most)?;
    read(&mut binary, size).map_err(failed)
}

fn read(file: &mut File, size: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    file.rewind()?;
    file.take(size).read_to_end(&mut bytes)?;
    Ok(bytes)
}
