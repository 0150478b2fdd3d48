//! The one folder of this run, and the guard that empties it should this process be killed.
//!
//! Every program the tests start lies in this folder or is told a path in it: that is how its processes are told from
//! those of anybody else, here and in `guard.sh`. The path is short because Unix sockets lie below it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result};

use super::proc;

#[derive(Debug)]
pub struct Base {
    path: PathBuf,
    /// Closed by the kernel when this process ends, however it ends.
    _alive: ChildStdin,
    _guard: Child,
}

static BASE: OnceLock<Base> = OnceLock::new();

/// Makes the folder and starts the guard; once, before any case.
pub fn create() -> Result<()> {
    let path = std::env::temp_dir().join(format!("trp{}", std::process::id()));
    fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
    // A session of its own: the terminal's Ctrl-C is meant for the tests, and the guard has to outlive them.
    let mut guard = Command::new("setsid")
        .args(["sh", "-c", include_str!("guard.sh"), "guard"])
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start the guard (setsid is in util-linux)")?;
    let alive = guard.stdin.take().context("the guard has no stdin")?;
    BASE.set(Base { path, _alive: alive, _guard: guard }).ok().context("there is a base folder already")
}

pub fn path() -> Result<&'static Path> {
    BASE.get().map(|base| base.path.as_path()).context("base::create was not called")
}

/// A folder below the base, made when first asked for.
pub fn folder(name: &str) -> Result<PathBuf> {
    let folder = path()?.join(name);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// What is left of this run: processes and mounts. Empty when all cases cleaned up behind themselves.
pub fn leftovers() -> Result<Vec<String>> {
    let base = path()?;
    let mut left: Vec<String> =
        proc::running_below(base).into_iter().map(|pid| format!("process {pid}: {}", proc::cmdline(pid))).collect();
    left.extend(proc::mounts_below(base)?.into_iter().map(|mount| format!("mount {mount}")));
    Ok(left)
}

/// Takes the folder away. The guard then finds nothing to do.
pub fn remove() {
    let Some(base) = BASE.get() else { return };
    if let Err(error) = fs::remove_dir_all(&base.path) {
        eprintln!("cannot remove {}: {error}", base.path.display());
    }
}

/// The shim's binary as this run knows it: links in a folder below the base, under both of its names. A hard link and
/// not a symbolic one, so that `/proc/<pid>/exe` of every shim process names this folder.
pub fn link_shim(folder: &Path) -> Result<PathBuf> {
    let built = std::env::var_os("TROUPE_SHIM")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_containerd-shim-wasmtime-v1")), PathBuf::from);
    fs::create_dir_all(folder)?;
    for name in ["containerd-shim-wasmtime-v1", "containerd-shim-wasm-v1"] {
        let link = folder.join(name);
        if fs::hard_link(&built, &link).is_err() {
            fs::copy(&built, &link).with_context(|| format!("cannot copy {}", built.display()))?;
        }
    }
    Ok(folder.join("containerd-shim-wasmtime-v1"))
}
