//! Compiled code, from a file into memory.
//!
//! Called by `workshop.rs`, on blocking threads, with files that the cache has just checked or the worker has just made.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;

use tracing::warn;
use wasmtime::component::Component;
use wasmtime::{Engine, Module, Precompiled};

use super::inspect::Format;

/// Mapped, executable code that is not linked yet.
pub enum Code {
    /// A core module.
    Module(Module),
    /// A component.
    Component(Component),
}

/// What the file calls itself; nobody has checked it yet.
pub(super) fn format(file: &File) -> Option<Format> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    match Engine::detect_precompiled_file(path).ok()?? {
        Precompiled::Module => Some(Format::Module),
        Precompiled::Component => Some(Format::Component),
    }
}

/// Makes the file executable code: mapped, or copied into memory where the file system forbids mapping code (noexec).
pub(super) fn map(engine: &Engine, format: Format, mut file: &File) -> wasmtime::Result<Code> {
    // By descriptor: the file that was checked is the one that is mapped.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    // SAFETY: two things are asked for. The bytes are wasmtime's own: they were written by our worker under this key, and
    // since then either the file is sealed (memory) or its digest over contents and key was just found right (cache). And
    // they stay as they are: a sealed file cannot change; in the cache, a folder closed to everyone but our user, files
    // are complete before they have a name and are only ever unlinked (`cache.rs`). Wasmtime checks version, settings and
    // CPU features itself. That the worker was not taken over by the module is assumed (`compile.rs`).
    let mapped = unsafe {
        match format {
            Format::Module => Module::deserialize_file(engine, &path).map(Code::Module),
            Format::Component => Component::deserialize_file(engine, &path).map(Code::Component),
        }
    };
    let error = match mapped {
        Ok(code) => return Ok(code),
        Err(error) => error,
    };
    let mut bytes = Vec::new();
    std::io::Seek::rewind(&mut file)?;
    file.read_to_end(&mut bytes)?;
    // SAFETY: the same bytes, and the copy is ours alone.
    let code = unsafe {
        match format {
            Format::Module => Module::deserialize(engine, bytes).map(Code::Module),
            Format::Component => Component::deserialize(engine, bytes).map(Code::Component),
        }
    }?;
    warn!(error = format!("{error:#}"), "compiled code cannot be mapped (a noexec mount?); a copy in memory is used");
    Ok(code)
}
