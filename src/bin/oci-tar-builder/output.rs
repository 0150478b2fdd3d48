//! The file that is written: all of it or nothing, whatever goes wrong and whoever writes the same at the same time.

use std::fs::{self, File, Permissions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tempfile::Builder;

/// Writes a file beside `out` and puts it in its place. Folders above it are made.
pub fn replace<T>(out: &Path, write: impl FnOnce(&mut BufWriter<&File>) -> Result<T>) -> Result<T> {
    let target = target(out)?;
    let folder = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    // As a new file of any other program: the umask decides who may read it.
    let partial = Builder::new().prefix(".oci-tar-").permissions(Permissions::from_mode(0o666)).tempfile_in(folder)?;
    let mut buffered = BufWriter::new(partial.as_file());
    let result = write(&mut buffered)?;
    buffered.flush()?;
    drop(buffered);
    partial.as_file().sync_all()?;
    partial.persist(&target)?;
    Ok(result)
}

/// The file behind a link; nothing that a rename would destroy.
fn target(out: &Path) -> Result<PathBuf> {
    let Ok(metadata) = fs::metadata(out) else {
        return Ok(out.to_owned());
    };
    if metadata.is_dir() {
        bail!("it is a folder, give the name of a file");
    }
    if !metadata.is_file() {
        bail!("it is a device or a pipe, give the name of a file");
    }
    Ok(fs::canonicalize(out)?)
}
