//! The modules behind one argument of `compile`: of the file or folder of this name, else of containerd's image.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use anyhow::{Context, Result, bail};
use tokio::runtime::Runtime;

use super::layout::Layout;
use super::stored::Containerd;

/// A module, or why it cannot be had.
#[derive(Debug)]
pub struct Found {
    /// For people: the file, and where in it.
    pub name: String,
    pub wasm: Result<Vec<u8>>,
}

/// What a tar file has at this place, since 1988.
const TAR: (usize, &[u8]) = (257, b"ustar");

/// What looks for modules.
pub struct Finder<'a> {
    /// Asks containerd.
    pub runtime: &'a Runtime,
    pub containerd: Containerd,
    /// The size that a module may have.
    pub most: u64,
}

impl Finder<'_> {
    /// Everything that the argument names, which is something.
    pub fn modules(&self, argument: &Path) -> Result<Vec<Found>> {
        let name = argument.display().to_string();
        let mut found = match fs::metadata(argument) {
            Ok(metadata) if metadata.is_dir() => in_layout(&Layout::folder(argument), self.most)?,
            Ok(metadata) if metadata.is_file() => {
                let mut file = File::open(argument)?;
                if !is_tar(&file)? {
                    let wasm = limited(&mut file, metadata.len(), self.most);
                    return Ok(vec![Found { name, wasm }]);
                }
                in_layout(&Layout::tar(file)?, self.most)?
            }
            Ok(_) => bail!("is not a regular file"),
            Err(error) if !is_absence(&error) => return Err(error.into()),
            Err(_) => match image_name(argument) {
                Some(image) => self
                    .containerd
                    .modules(self.runtime, image, self.most)
                    .context("there is no such file, and as the name of an image")?,
                None => bail!("there is no such file; as a path, it cannot be the name of an image either"),
            },
        };
        if found.is_empty() {
            bail!("holds no wasm module");
        }
        for module in &mut found {
            module.name = format!("{name}:{}", module.name);
        }
        Ok(found)
    }
}

fn in_layout(layout: &Layout, most: u64) -> Result<Vec<Found>> {
    layout.modules(most).context("as an image")
}

fn is_absence(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Whoever writes a path, or a file's name, does not mean an image.
fn image_name(argument: &Path) -> Option<&str> {
    const FILES: [&str; 5] = ["wasm", "wat", "tar", "gz", "cwasm"];
    let text = argument.to_str()?;
    let extension = argument.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let is_path = text.starts_with(['/', '.', '~']) || text.ends_with('/') || FILES.contains(&extension);
    (!is_path).then_some(text)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_told_from_names() {
        for name in ["app", "app:1", "docker.io/library/app:latest", "r:5000/app.wasm:1", "a@sha256:00", "a/b"] {
            assert_eq!(image_name(Path::new(name)), Some(name));
        }
        for path in
            ["/app", "./app", "../app", "app.wasm", "a/b.wat", "image.tar", "image.tar.gz", "folder/", "~/a", "."]
        {
            assert_eq!(image_name(Path::new(path)), None, "{path}");
        }
    }
}
