//! An OCI image layout, in a tar file or a folder, and the wasm in its images.
//!
//! ```text
//!   index.json ─▶ (index ─▶) manifest ─▶ layers ─┬─ wasm: a module
//!                                                └─ file system: files that begin as wasm does, or are called `.wat`
//! ```
//! Layers of a file system lie one on another: what a later one replaces or removes is no module of the image. All
//! images and platforms of a layout count; what several of them hold is found once. Every blob is checked against its
//! digest: what is compiled is what the image names.
//!
//! Called by `found.rs`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest, MediaType};
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use super::found::{Found, limited};

/// No index or manifest is as large.
const MAX_DOCUMENT: u64 = 4 << 20;
/// An index of indexes is unusual, more than a few levels are a trap.
const MAX_DEPTH: usize = 4;
const WASM: &[u8] = b"\0asm";
const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// The files of a layout.
#[derive(Debug)]
pub enum Layout {
    Folder(PathBuf),
    /// Where in the tar file each member's contents are, and how long.
    Tar(File, HashMap<PathBuf, (u64, u64)>),
}

/// The wasm files of an image's root filesystem, by their path in it.
type Rootfs = BTreeMap<PathBuf, Result<Vec<u8>>>;

impl Layout {
    pub fn folder(path: &Path) -> Self {
        Self::Folder(path.to_owned())
    }

    pub fn tar(file: File) -> Result<Self> {
        let mut members = HashMap::new();
        let mut archive = tar::Archive::new(file);
        for entry in archive.entries_with_seek().context("the tar file")? {
            let entry = entry.context("the tar file")?;
            if entry.header().entry_type().is_file() {
                members.insert(plain(&entry.path()?), (entry.raw_file_position(), entry.size()));
            }
        }
        Ok(Self::Tar(archive.into_inner(), members))
    }

    /// The modules of all its images.
    pub fn modules(&self, most: u64) -> Result<Vec<Found>> {
        let (from, size) = self.open(Path::new("index.json"))?;
        let index: ImageIndex = document(from, size).context("index.json")?;
        let mut found = BTreeMap::new();
        let mut seen = BTreeSet::new();
        self.walk(&index, most, 0, &mut seen, &mut found)?;
        Ok(found.into_iter().map(|(name, wasm)| Found { name, wasm }).collect())
    }

    fn walk(
        &self,
        index: &ImageIndex,
        most: u64,
        depth: usize,
        seen: &mut BTreeSet<String>,
        found: &mut BTreeMap<String, Result<Vec<u8>>>,
    ) -> Result<()> {
        for descriptor in index.manifests() {
            let digest = descriptor.digest().to_string();
            if !seen.insert(digest.clone()) {
                continue;
            }
            match descriptor.media_type() {
                MediaType::ImageIndex if depth == MAX_DEPTH => bail!("{digest}: indexes within indexes within indexes"),
                MediaType::ImageIndex => self.walk(&self.described(descriptor)?, most, depth + 1, seen, found)?,
                MediaType::ImageManifest => self.image(&self.described(descriptor)?, most, found).context(digest)?,
                MediaType::Other(docker) if docker.ends_with(".manifest.list.v2+json") => {
                    self.walk(&self.described(descriptor)?, most, depth + 1, seen, found)?;
                }
                MediaType::Other(docker) if docker.ends_with(".manifest.v2+json") => {
                    self.image(&self.described(descriptor)?, most, found).context(digest)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn image(&self, manifest: &ImageManifest, most: u64, found: &mut BTreeMap<String, Result<Vec<u8>>>) -> Result<()> {
        let mut rootfs = Rootfs::new();
        for layer in manifest.layers() {
            let media = layer.media_type().to_string();
            if media.contains("wasm") {
                let title = layer.annotations().as_ref().and_then(|all| all.get("org.opencontainers.image.title"));
                let name = title.cloned().unwrap_or_else(|| layer.digest().to_string());
                let mut blob = self.blob(layer)?;
                let wasm = limited(&mut blob, layer.size(), most).and_then(|wasm| blob.finish().map(|()| wasm));
                insert(found, name, layer.digest().digest(), wasm);
            } else if media.contains("image.layer.") || media.contains("image.rootfs.") {
                let mut blob = self.blob(layer)?;
                overlay(&mut rootfs, &mut blob, most).and_then(|()| blob.finish()).context(media)?;
            }
        }
        for (path, wasm) in rootfs {
            let name = format!("/{}", path.display());
            let unique = wasm.as_ref().map_or_else(|_| "refused".to_owned(), |wasm| hex(&Sha256::digest(wasm)));
            insert(found, name, &unique, wasm);
        }
        Ok(())
    }

    fn described<T: DeserializeOwned>(&self, descriptor: &Descriptor) -> Result<T> {
        let mut blob = self.blob(descriptor)?;
        let parsed = document(&mut blob, descriptor.size()).with_context(|| descriptor.digest().to_string())?;
        blob.finish()?;
        Ok(parsed)
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<Checked<'_>> {
        let digest = descriptor.digest().to_string();
        let hex = digest.strip_prefix("sha256:").with_context(|| format!("{digest}: only sha256 is supported"))?;
        if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            bail!("{digest}: is no digest");
        }
        let (from, size) = self.open(&Path::new("blobs/sha256").join(hex))?;
        if size != descriptor.size() {
            bail!("{digest}: has {size} bytes, the image says {}", descriptor.size());
        }
        Ok(Checked { from, hash: Sha256::new(), expected: hex.to_owned() })
    }

    fn open(&self, name: &Path) -> Result<(Box<dyn Read + '_>, u64)> {
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

/// Two images may call different modules by the same name; the same module is named once.
fn insert(found: &mut BTreeMap<String, Result<Vec<u8>>>, name: String, unique: &str, wasm: Result<Vec<u8>>) {
    match (found.get(&name), &wasm) {
        (Some(Ok(known)), Ok(wasm)) if known == wasm => {}
        (Some(_), _) => drop(found.insert(format!("{name} ({})", unique.get(..12).unwrap_or(unique)), wasm)),
        (None, _) => drop(found.insert(name, wasm)),
    }
}

/// A blob that is compared with its digest when it has been read.
struct Checked<'a> {
    from: Box<dyn Read + 'a>,
    hash: Sha256,
    expected: String,
}

impl Read for Checked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        self.hash.update(&buffer[..read]);
        Ok(read)
    }
}

impl Checked<'_> {
    fn finish(mut self) -> Result<()> {
        io::copy(&mut self, &mut io::sink())?;
        if hex(&self.hash.finalize()) != self.expected.to_ascii_lowercase() {
            bail!("sha256:{}: its contents are not those of the digest", self.expected);
        }
        Ok(())
    }
}

fn document<T: DeserializeOwned>(from: impl Read, size: u64) -> Result<T> {
    if size > MAX_DOCUMENT {
        bail!("{size} bytes are too many for a document");
    }
    Ok(serde_json::from_reader(from.take(MAX_DOCUMENT))?)
}

/// Lays one layer over the wasm files of those below.
fn overlay(rootfs: &mut Rootfs, layer: &mut impl Read, most: u64) -> Result<()> {
    let mut head = [0; 4];
    let length = fill(layer, &mut head)?;
    let whole = io::Cursor::new(head[..length].to_vec()).chain(layer);
    if head.starts_with(GZIP) {
        files(rootfs, flate2::read::MultiGzDecoder::new(whole), most)
    } else if head == ZSTD {
        bail!(
            "is compressed with zstd, which is not supported: convert the image to gzip, or name the wasm file itself"
        );
    } else {
        files(rootfs, whole, most)
    }
}

fn files(rootfs: &mut Rootfs, layer: impl Read, most: u64) -> Result<()> {
    // What this layer removes is below it, never beside it.
    let mut fresh = Rootfs::new();
    for entry in tar::Archive::new(layer).entries()? {
        let mut entry = entry?;
        let path = plain(&entry.path()?);
        if let Some(hidden) = path.file_name().and_then(|name| name.to_str()?.strip_prefix(".wh.")) {
            let folder = path.parent().unwrap_or(Path::new(""));
            let gone = if hidden == ".wh..opq" { folder.to_owned() } else { folder.join(hidden) };
            rootfs.retain(|known, _| !known.starts_with(&gone));
            continue;
        }
        // Whatever it is takes the place of what had the name; folders are merged.
        fresh.remove(&path);
        let merges = entry.header().entry_type().is_dir();
        rootfs.retain(|known, _| if merges { *known != path } else { !known.starts_with(&path) });
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let size = entry.size();
        let mut head = [0; 4];
        let length = fill(&mut entry, &mut head)?;
        // Text looks like any other text at its beginning, so its name has to tell.
        if head == WASM || path.extension().is_some_and(|extension| extension == "wat") {
            let wasm = limited(&mut io::Cursor::new(&head[..length]).chain(entry), size, most);
            fresh.insert(path, wasm);
        }
    }
    rootfs.append(&mut fresh);
    Ok(())
}

/// Reads as much as there is and fits.
fn fill(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match from.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

/// The path without what does not name anything: `/`, `.`, `..`.
fn plain(path: &Path) -> PathBuf {
    path.components().filter(|component| matches!(component, Component::Normal(_))).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
