//! The one layer of a scratch image: which file lies where, as a tar of fixed owners, modes and times.
//!
//! Invariant: entries come sorted and each directory precedes what it holds, whatever the order of the command line.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use tar::{Builder, EntryType};

use crate::layout::append;

/// One node of the root filesystem.
#[derive(Debug)]
enum Entry {
    Directory,
    File { content: Vec<u8>, mode: u32 },
}

/// The root filesystem, by path relative to `/`.
#[derive(Debug, Default)]
pub struct Entries(BTreeMap<PathBuf, Entry>);

impl Entries {
    /// Adds the file `source` of this machine as `destination`, and the directories above it.
    pub fn add(&mut self, source: &Path, destination: &Path) -> Result<()> {
        let path = inside(destination)?;
        let content = fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
        let executable = fs::metadata(source)?.permissions().mode() & 0o111 != 0;
        for parent in path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()) {
            match self.0.insert(parent.to_owned(), Entry::Directory) {
                Some(Entry::File { .. }) => bail!("/{} would be both a file and a directory", parent.display()),
                Some(Entry::Directory) | None => {}
            }
        }
        let file = Entry::File { content, mode: if executable { 0o755 } else { 0o644 } };
        match self.0.insert(path.clone(), file) {
            Some(_) => bail!("two files claim /{}: rename {}", path.display(), source.display()),
            None => Ok(()),
        }
    }

    /// The layer: owner root, time 0, sorted.
    pub fn to_tar(&self) -> Result<Vec<u8>> {
        let mut tar = Builder::new(Vec::new());
        for (path, entry) in &self.0 {
            match entry {
                Entry::Directory => append(&mut tar, path, EntryType::Directory, 0o755, &[])?,
                Entry::File { content, mode } => append(&mut tar, path, EntryType::Regular, *mode, content)?,
            }
        }
        Ok(tar.into_inner()?)
    }
}

/// The path relative to the root; a path that could leave it is refused, not repaired.
fn inside(destination: &Path) -> Result<PathBuf> {
    let mut path = PathBuf::new();
    for component in destination.components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => bail!("{}: `..` is not allowed", destination.display()),
        }
    }
    if path.as_os_str().is_empty() {
        bail!("{}: names the root, not a file", destination.display());
    }
    Ok(path)
}
