//! Images for the cases, packed by the project's own `oci-tar-builder`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::{SOON, base, guests, job};

/// The image that most cases run: every guest as a file in `/`, no entrypoint.
pub const GUESTS: &str = "test.local/guests:latest";

/// What `oci-tar-builder` makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An image config over layers of wasm; containerd 1.7 and later.
    Layers,
    /// The CNCF's artifact; through CRI only.
    Artifact,
    /// Files in a root filesystem.
    Rootfs,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Layers, Self::Artifact, Self::Rootfs];

    fn flag(self) -> Option<&'static str> {
        match self {
            Self::Layers => None,
            Self::Artifact => Some("--as-artifact"),
            Self::Rootfs => Some("--rootfs"),
        }
    }
}

/// `oci-tar-builder` for an image `test.local/NAME:latest`.
pub fn builder(kind: Kind, name: &str, modules: &[&Path], options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oci-tar-builder"));
    command.args(kind.flag()).args(["--repo=test.local", "--name", name]).args(options);
    for module in modules {
        command.arg("--module").arg(module);
    }
    command
}

/// Packs a scratch image and returns its file.
pub fn pack(name: &str, modules: &[&Path], options: &[&str]) -> Result<PathBuf> {
    pack_as(Kind::Rootfs, name, modules, options)
}

/// Packs an image of any kind and returns its file. The name is to differ from those of all other images.
pub fn pack_as(kind: Kind, name: &str, modules: &[&Path], options: &[&str]) -> Result<PathBuf> {
    let tar = base::folder("images")?.join(format!("{name}.tar"));
    if !tar.exists() {
        let mut command = builder(kind, name, modules, options);
        command.arg("-o").arg(&tar);
        job::run(command, SOON)?.success("oci-tar-builder")?;
    }
    Ok(tar)
}

/// The image of all guests.
pub fn guests() -> Result<PathBuf> {
    let mut modules = Vec::new();
    for name in guests::BUILT {
        modules.push(guests::built(name)?);
    }
    modules.extend(guests::compiled_texts()?);
    let modules: Vec<&Path> = modules.iter().map(PathBuf::as_path).collect();
    pack("guests", &modules, &["--workdir=/", "--env=PATH=/bin"])
}
