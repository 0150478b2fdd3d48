//! Images for the cases, packed by the project's own `oci-tar-builder`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::{SOON, base, guests, job};

/// The image that most cases run: every guest as a file in `/`, no entrypoint.
pub const GUESTS: &str = "test.local/guests:latest";

/// Packs an image and returns its file.
pub fn pack(name: &str, modules: &[&Path], options: &[&str]) -> Result<PathBuf> {
    let tar = base::folder("images")?.join(format!("{name}.tar"));
    if !tar.exists() {
        let mut command = Command::new(env!("CARGO_BIN_EXE_oci-tar-builder"));
        command.args(["--rootfs", "--repo=test.local", "--name", name]).args(options);
        for module in modules {
            command.arg("--module").arg(module);
        }
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
