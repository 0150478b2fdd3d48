//! The modules of images, out of their layers, wherever those are.
//!
//! ```text
//!   layers ─┬─ wasm: a module
//!           └─ file system: the files in it that begin as wasm does
//! ```
//! Layers of a file system lie one on another: what a later one replaces or removes is no module of the image. Every blob
//! is checked against its digest: what is compiled is what the image names.
//!
//! Called by `layout.rs`, `docker.rs` and `stored.rs`. Invariant: what is held at a time is bounded, whatever the images say.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest as _, Sha256};

use super::found::{Found, limited};
use super::tarball::bounded;
use super::unpack::{fill, unpacked};
use crate::image::Descriptor;

const WASM: &[u8] = b"\0asm";

/// How many modules are held together; no image that somebody means to run has as many.
const MAX_MODULES: usize = 1024;
/// How many bytes of them, in modules of the largest size.
const MAX_HELD: u64 = 4;

/// Modules by their names, or why they cannot be had.
type Named<N> = BTreeMap<N, Result<Vec<u8>>>;

/// The wasm files of an image's root filesystem, by their path in it.
type Rootfs = Named<PathBuf>;

/// What has been found so far.
pub struct Modules {
    found: Named<String>,
    /// The size that a module may have.
    most: u64,
}

impl Modules {
    pub fn new(most: u64) -> Self {
        Self { found: BTreeMap::new(), most }
    }

    pub fn into_found(self) -> Vec<Found> {
        self.found.into_iter().map(|(name, wasm)| Found { name, wasm }).collect()
    }

    /// Adds those of one image.
    pub fn image<'a>(
        &mut self,
        layers: &[Descriptor],
        open: impl Fn(&Descriptor) -> Result<Checked<'a>>,
    ) -> Result<()> {
        let mut rootfs = Rootfs::new();
        for layer in layers {
            if layer.is_wasm() {
                let name = layer.title().unwrap_or(&layer.digest).to_owned();
                let wasm = allowed(layer.size, self.most, held(&self.found) + held(&rootfs))
                    .and_then(|()| open(layer))
                    .and_then(|blob| whole(blob, layer.size, self.most));
                self.insert(name, layer.hex().unwrap_or_default(), wasm)?;
            } else if layer.media_type.contains("image.layer.") || layer.media_type.contains("image.rootfs.") {
                let mut blob = open(layer)?;
                overlay(&mut rootfs, &mut blob, self.most, held(&self.found))
                    .and_then(|()| blob.finish())
                    .with_context(|| layer.media_type.clone())?;
            }
        }
        for (path, wasm) in rootfs {
            let unique = wasm.as_ref().map_or_else(|_| "refused".to_owned(), |wasm| hex(&Sha256::digest(wasm)));
            self.insert(format!("/{}", path.display()), &unique, wasm)?;
        }
        Ok(())
    }

    /// Two images may call different modules by the same name; the same module is named once.
    pub fn insert(&mut self, name: String, unique: &str, wasm: Result<Vec<u8>>) -> Result<()> {
        if self.found.len() == MAX_MODULES {
            bail!("more than {MAX_MODULES} modules");
        }
        match (self.found.get(&name), &wasm) {
            (Some(Ok(known)), Ok(wasm)) if known == wasm => {}
            (Some(_), _) => drop(self.found.insert(format!("{name} ({})", unique.get(..12).unwrap_or(unique)), wasm)),
            (None, _) => drop(self.found.insert(name, wasm)),
        }
        Ok(())
    }
}

fn whole(mut blob: Checked<'_>, size: u64, most: u64) -> Result<Vec<u8>> {
    let wasm = limited(&mut blob, size, most)?;
    blob.finish()?;
    Ok(wasm)
}

fn held<N>(modules: &Named<N>) -> u64 {
    modules.values().flatten().map(|wasm| wasm.len() as u64).sum()
}

/// Whether there is room for a further module.
fn allowed(size: u64, most: u64, held: u64) -> Result<()> {
    let room = most.saturating_mul(MAX_HELD);
    // What is too large by itself is told by whoever reads it.
    if size <= most && held.saturating_add(size) > room {
        bail!(
            "has no room beside the others: the modules of one source may have {room} bytes; name its file by itself"
        );
    }
    Ok(())
}

/// A blob that is compared with its size and its digest as it is read.
pub struct Checked<'a> {
    from: Box<dyn Read + 'a>,
    hash: Sha256,
    expected: String,
    /// Of what its size says; `None` where nobody said it.
    left: Option<u64>,
}

impl<'a> Checked<'a> {
    /// Opens the blob of these hexadecimal digits.
    pub fn new(blob: &Descriptor, open: impl FnOnce(&str) -> Result<Box<dyn Read + 'a>>) -> Result<Self> {
        let hex = blob.hex().map_err(anyhow::Error::msg)?;
        Ok(Self { from: open(hex)?, hash: Sha256::new(), expected: hex.to_owned(), left: Some(blob.size) })
    }

    /// The same where only the digest is told.
    pub fn of_digest(blob: &Descriptor, from: Box<dyn Read + 'a>) -> Result<Self> {
        let expected = blob.hex().map_err(anyhow::Error::msg)?.to_owned();
        Ok(Self { from, hash: Sha256::new(), expected, left: None })
    }

    /// Reads what is left, and compares.
    pub fn finish(mut self) -> Result<()> {
        io::copy(&mut self, &mut io::sink())?;
        if let Some(left @ 1..) = self.left {
            bail!("sha256:{}: it has {left} bytes less than it is said to have", self.expected);
        }
        if hex(&self.hash.finalize()) != self.expected {
            bail!("sha256:{}: its contents are not those of the digest", self.expected);
        }
        Ok(())
    }
}

impl Read for Checked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        if let Some(left) = &mut self.left {
            *left = left.checked_sub(read as u64).ok_or_else(|| {
                io::Error::other(format!("sha256:{}: it has more bytes than it is said to have", self.expected))
            })?;
        }
        self.hash.update(&buffer[..read]);
        Ok(read)
    }
}

/// Lays one layer over the wasm files of those below.
fn overlay(rootfs: &mut Rootfs, layer: &mut impl Read, most: u64, elsewhere: u64) -> Result<()> {
    // What this layer removes is below it, never beside it.
    let mut fresh = Rootfs::new();
    let (layer, bound) = bounded(unpacked(layer)?);
    for entry in tar::Archive::new(layer).entries()? {
        let mut entry = entry?;
        bound.pass(&entry)?;
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
            if rootfs.len() + fresh.len() >= MAX_MODULES {
                bail!("more than {MAX_MODULES} modules");
            }
            let wasm = allowed(size, most, elsewhere + held(rootfs) + held(&fresh))
                .and_then(|()| limited(&mut io::Cursor::new(&head[..length]).chain(entry), size, most));
            fresh.insert(path, wasm);
        }
    }
    rootfs.append(&mut fresh);
    Ok(())
}

/// The path without what does not name anything: `/`, `.`, `..`.
pub fn plain(path: &Path) -> PathBuf {
    path.components().filter(|component| matches!(component, Component::Normal(_))).collect()
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
