//! The modules behind one argument of `compile`.
//!
//! An argument that is no file could be the name of an image that containerd has: the place for that is [`modules`], and
//! what it needs is a list of [`Found`].

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::layout::Layout;

/// A module, or why it cannot be had.
#[derive(Debug)]
pub struct Found {
    /// For people: the file, and where in it.
    pub name: String,
    pub wasm: Result<Vec<u8>>,
}

/// What a tar file has at this place, since 1988.
const TAR: (usize, &[u8]) = (257, b"ustar");

/// Everything that the argument names, none of it larger than `most` bytes.
pub fn modules(argument: &Path, most: u64) -> Result<Vec<Found>> {
    let name = argument.display().to_string();
    let metadata = match fs::metadata(argument) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => bail!(
            "no such file. Images are read from files, not from containerd: `ctr image export image.tar {name}`, then \
             `compile image.tar`"
        ),
        Err(error) => return Err(error.into()),
    };
    let layout = if metadata.is_dir() {
        Layout::folder(argument)
    } else if !metadata.is_file() {
        bail!("is not a regular file");
    } else {
        let mut file = File::open(argument)?;
        if !is_tar(&file)? {
            let wasm = limited(&mut file, metadata.len(), most);
            return Ok(vec![Found { name, wasm }]);
        }
        Layout::tar(file)?
    };
    let mut found = layout.modules(most).context("as an OCI image layout")?;
    if found.is_empty() {
        bail!("holds no wasm module");
    }
    for module in &mut found {
        module.name = format!("{name}:{}", module.name);
    }
    Ok(found)
}

fn is_tar(file: &File) -> io::Result<bool> {
    use std::os::unix::fs::FileExt as _;
    let mut magic = [0; TAR.1.len()];
    match file.read_exact_at(&mut magic, TAR.0 as u64) {
        Ok(()) => Ok(magic == TAR.1),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads all of it, if it is not too much.
pub fn limited(from: &mut impl io::Read, size: u64, most: u64) -> Result<Vec<u8>> {
    if size > most {
        bail!("has {size} bytes, more than the {most} that the runtime option `max_module_size` allows");
    }
    let mut bytes = Vec::with_capacity(usize::try_from(size)?);
    from.take(size).read_to_end(&mut bytes)?;
    if (bytes.len() as u64) < size {
        bail!("ends after {} of {size} bytes", bytes.len());
    }
    Ok(bytes)
}
