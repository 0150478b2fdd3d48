//! An OCI image layout, in a tar file or a folder, and the wasm in its images.
//!
//! ```text
//!   index.json ─▶ (index ─▶) manifest ─▶ layers ─┬─ wasm: a module
//!                                                └─ file system: files that begin as wasm does, or are called `.wat`
//! ```
//! Without an `index.json`, it may be an archive of Docker's (`docker.rs`).
//!
//! All images and platforms of a layout count; what several of them hold is found once (`layers.rs`).
//!
//! Called by `found.rs`.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use oci_spec::image::{self, ImageIndex, ImageManifest, MediaType};
use serde::de::DeserializeOwned;
use troupe_actors::absolute;

use super::docker;
use super::found::Found;
use super::layers::{Checked, Modules, plain};
use super::tarball::bounded;
use crate::image::Descriptor;

const INDEX: &str = "index.json";

/// No index or manifest is as large.
const MAX_DOCUMENT: u64 = 4 << 20;
/// An index of indexes is unusual, more than a few levels are a trap.
const MAX_DEPTH: usize = 4;

/// The files of a layout.
#[derive(Debug)]
pub enum Layout {
    Folder(PathBuf),
    /// Where in the tar file each member's contents are, and how long.
    Tar(File, HashMap<PathBuf, (u64, u64)>),
}

impl Layout {
    pub fn folder(path: &Path) -> Self {
        Self::Folder(path.to_owned())
    }

    pub fn tar(file: File) -> Result<Self> {
        let (mut members, mut links) = (HashMap::new(), Vec::new());
        let (reader, bound) = bounded(&file);
        for entry in tar::Archive::new(reader).entries_with_seek().context("the tar file")? {
            let entry = entry.context("the tar file")?;
            bound.pass(&entry).context("the tar file")?;
            let path = plain(&entry.path()?);
            if entry.header().entry_type().is_file() {
                members.insert(path, (entry.raw_file_position(), entry.size()));
            } else if let Some(target) = entry.link_name()?.filter(|_| entry.header().entry_type().is_symlink()) {
                let folder = path.parent().unwrap_or(Path::new("")).to_owned();
                links.push((path, plain(&absolute(&folder.join(target)))));
            }
        }
        // Docker writes a layer that several images have once.
        for (path, target) in links {
            if let Some(member) = members.get(&target).copied() {
                members.entry(path).or_insert(member);
            }
        }
        Ok(Self::Tar(file, members))
    }

    /// The modules of all its images.
    pub fn modules(&self, most: u64) -> Result<Vec<Found>> {
        let mut found = Modules::new(most);
        if self.has(INDEX) || !self.has(docker::LIST) {
            let (from, size) = self.open(Path::new(INDEX))?;
            let index: ImageIndex = document(from, size).context(INDEX)?;
            self.walk(&index, 0, &mut BTreeSet::new(), &mut found)?;
        } else {
            docker::images(self, &mut found)?;
        }
        Ok(found.into_found())
    }

    fn walk(&self, index: &ImageIndex, depth: usize, seen: &mut BTreeSet<String>, found: &mut Modules) -> Result<()> {
        for descriptor in index.manifests() {
            let digest = descriptor.digest().to_string();
            if !seen.insert(digest.clone()) {
                continue;
            }
            match descriptor.media_type() {
                MediaType::ImageIndex if depth == MAX_DEPTH => bail!("{digest}: indexes within indexes within indexes"),
                MediaType::ImageIndex => self.walk(&self.described(descriptor)?, depth + 1, seen, found)?,
                MediaType::ImageManifest => self.image(&self.described(descriptor)?, found).context(digest)?,
                MediaType::Other(docker) if docker.ends_with(".manifest.list.v2+json") => {
                    self.walk(&self.described(descriptor)?, depth + 1, seen, found)?;
                }
                MediaType::Other(docker) if docker.ends_with(".manifest.v2+json") => {
                    self.image(&self.described(descriptor)?, found).context(digest)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn image(&self, manifest: &ImageManifest, found: &mut Modules) -> Result<()> {
        let layers: Vec<_> = manifest.layers().iter().map(plainly).collect();
        found.image(&layers, |layer| self.blob(layer))
    }

    fn described<T: DeserializeOwned>(&self, descriptor: &image::Descriptor) -> Result<T> {
        let mut blob = self.blob(&plainly(descriptor))?;
        let parsed = document(&mut blob, descriptor.size()).with_context(|| descriptor.digest().to_string())?;
        blob.finish()?;
        Ok(parsed)
    }

    fn blob(&self, blob: &Descriptor) -> Result<Checked<'_>> {
        Checked::new(blob, |hex| {
            let (from, size) = self.open(&Path::new("blobs/sha256").join(hex))?;
            if size != blob.size {
                bail!("{}: has {size} bytes, the image says {}", blob.digest, blob.size);
            }
            Ok(from)
        })
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::Folder(folder) => folder.join(name).exists(),
            Self::Tar(_, members) => members.contains_key(Path::new(name)),
        }
    }

    /// One of its files, and how long it is.
    pub fn open(&self, name: &Path) -> Result<(Box<dyn Read + '_>, u64)> {
        match self {
            Self::Folder(folder) => {
                let file = File::open(folder.join(name)).with_context(|| name.display().to_string())?;
                let metadata = file.metadata()?;
                if !metadata.is_file() {
                    bail!("{}: is not a regular file", name.display());
                }
                Ok((Box::new(file), metadata.len()))
            }
            Self::Tar(file, members) => {
                let (at, size) = members.get(name).with_context(|| format!("{}: is not in it", name.display()))?;
                let mut file: &File = file;
                file.seek(SeekFrom::Start(*at))?;
                Ok((Box::new(file.take(*size)), *size))
            }
        }
    }
}

/// What matters of a descriptor, in the words of `src/image/`.
fn plainly(descriptor: &image::Descriptor) -> Descriptor {
    Descriptor {
        media_type: descriptor.media_type().to_string(),
        digest: descriptor.digest().to_string(),
        size: descriptor.size(),
        annotations: descriptor.annotations().clone(),
        platform: None,
    }
}

/// Reads a document that is not too large for one.
pub fn document<T: DeserializeOwned>(from: impl Read, size: u64) -> Result<T> {
    if size > MAX_DOCUMENT {
        bail!("{size} bytes are too many for a document");
    }
    Ok(serde_json::from_reader(from.take(MAX_DOCUMENT))?)
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
