//! A folder of compiled code, the worker that fills it, and modules to compile.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use troupe_actors::guest::{Code, CompileSettings, Engines, Programs};

pub const WORKER: &str = env!("CARGO_BIN_EXE_containerd-shim-wasmtime-v1");

pub struct Fixture {
    pub folder: tempfile::TempDir,
    pub settings: CompileSettings,
}

impl Fixture {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = CompileSettings::new(folder.path().join("cache"));
        settings.worker = WORKER.into();
        settings.linger = Duration::ZERO;
        Self { folder, settings }
    }

    /// A worker of our own: this shell script, with the real one in `$REAL`.
    pub fn scripted(script: &str) -> Self {
        let mut fixture = Self::new();
        let path = fixture.folder.path().join("worker");
        std::fs::write(
            &path,
            format!("#!/bin/sh\nREAL={WORKER}\nHERE={}\n{script}\n", fixture.folder.path().display()),
        )
        .unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        fixture.settings.worker = path;
        fixture
    }

    /// As if in a process of its own: nothing is shared but the folder.
    pub fn programs(&self) -> Programs<Code> {
        Programs::new(Engines::new(), self.settings.clone(), |_, _, code| Ok(code))
    }

    pub fn entries(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.settings.cache_dir).into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// How often the scripted worker ran: it appends to this file.
    pub fn runs(&self) -> usize {
        std::fs::read_to_string(self.folder.path().join("runs")).unwrap_or_default().lines().count()
    }
}

pub const COUNTED: &str = "echo run >> $HERE/runs; exec $REAL \"$@\"";

pub fn module(number: usize) -> Vec<u8> {
    wat::parse_str(format!("(module (func (export \"_start\") (drop (i32.const {number}))))")).unwrap()
}

/// A component that serves requests; nothing of it runs here.
pub fn server() -> Vec<u8> {
    let text = "(component (component $c) (instance $i (instantiate $c)) \
                (export \"wasi:http/incoming-handler@0.2.0\" (instance $i)))";
    wat::parse_str(text).unwrap()
}

/// A component of WASI 0.3.
pub fn concurrent() -> Vec<u8> {
    wat::parse_str("(component (import \"wasi:clocks/monotonic-clock@0.3.0\" (instance)))").unwrap()
}

/// Small to read, long to compile: many copies of one function. About 20 s of one core in a plain build.
pub fn slow() -> Vec<u8> {
    heavy(3000)
}

/// The same with so many copies.
pub fn heavy(functions: usize) -> Vec<u8> {
    let work = "(local.set 0 (i32.xor (i32.add (local.get 0) (local.get 0)) (i32.const 7)))".repeat(400);
    let function = format!("(func (param i32) (result i32) {work} (local.get 0))");
    wat::parse_str(format!("(module {})", function.repeat(functions))).unwrap()
}
