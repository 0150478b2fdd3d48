//! Any image as an OCI image layout in one tar file: manifest, index, blobs by digest.
//!
//! The documents are types of `oci-spec`, which the runtimes of the OCI are built on; a crate that writes layouts
//! (`ocidir`) makes folders, not archives, and brings OpenSSL. Two annotations name the image:
//! `org.opencontainers.image.ref.name` is the standard's (the tag, for skopeo and umoci), `io.containerd.image.name` is
//! containerd's (the whole reference, so that `ctr image import` needs no flag). Documents are serialised with sorted
//! keys, since the annotations of `oci-spec` are hash maps.

use std::collections::{BTreeSet, HashMap};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use oci_spec::image::{
    ANNOTATION_REF_NAME, ANNOTATION_TITLE, Descriptor, DescriptorBuilder, ImageIndexBuilder, ImageManifestBuilder,
    MediaType, OciLayoutBuilder, PlatformBuilder, SCHEMA_VERSION, Sha256Digest,
};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::args::Platform;

/// Where containerd looks for the full name of an imported image.
const ANNOTATION_CONTAINERD_NAME: &str = "io.containerd.image.name";

/// What the image is called.
#[derive(Debug)]
pub struct Name {
    /// `repo/name:tag`.
    pub full: String,
    pub tag: String,
}

/// Config and layers, whatever their kind.
#[derive(Debug)]
pub struct Image {
    pub platform: Platform,
    pub config: Blob,
    pub layers: Vec<Blob>,
}

/// Bytes with a media type, and the name of the file they were.
#[derive(Debug)]
pub struct Blob {
    pub media_type: MediaType,
    pub content: Vec<u8>,
    title: Option<String>,
}

impl Blob {
    pub fn new(media_type: MediaType, content: Vec<u8>) -> Self {
        Self { media_type, content, title: None }
    }

    pub fn named(media_type: MediaType, content: Vec<u8>, title: String) -> Self {
        Self { media_type, content, title: Some(title) }
    }

    /// `sha256:…`.
    pub fn digest(&self) -> String {
        format!("sha256:{}", sha256(&self.content))
    }

    fn descriptor(&self) -> Result<Descriptor> {
        let digest: Sha256Digest = sha256(&self.content).parse()?;
        let size = self.content.len() as u64;
        let mut builder = DescriptorBuilder::default().media_type(self.media_type.clone()).size(size).digest(digest);
        if let Some(title) = &self.title {
            builder = builder.annotations(HashMap::from([(ANNOTATION_TITLE.to_owned(), title.clone())]));
        }
        Ok(builder.build()?)
    }
}

/// Writes the whole image and returns the manifest's digest.
pub fn write(out: &mut impl Write, name: &Name, image: &Image) -> Result<String> {
    let layers = image.layers.iter().map(Blob::descriptor).collect::<Result<Vec<_>>>()?;
    let manifest = ImageManifestBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageManifest)
        .config(image.config.descriptor()?)
        .layers(layers)
        .build()?;
    let manifest = Blob::new(MediaType::ImageManifest, json(&manifest)?);
    let index = ImageIndexBuilder::default()
        .schema_version(SCHEMA_VERSION)
        .media_type(MediaType::ImageIndex)
        .manifests(vec![entry(name, &image.platform, &manifest)?])
        .build()?;
    let marker = OciLayoutBuilder::default().image_layout_version("1.0.0").build()?;

    let mut tar = Builder::new(out);
    append(&mut tar, Path::new("oci-layout"), EntryType::Regular, 0o644, &json(&marker)?)?;
    append(&mut tar, Path::new("index.json"), EntryType::Regular, 0o644, &json(&index)?)?;
    let mut written = BTreeSet::new();
    for blob in [&image.config, &manifest].into_iter().chain(&image.layers) {
        let digest = sha256(&blob.content);
        // Two layers may have the same content.
        if !written.contains(&digest) {
            append(&mut tar, &Path::new("blobs/sha256").join(&digest), EntryType::Regular, 0o644, &blob.content)?;
            written.insert(digest);
        }
    }
    tar.into_inner()?;
    Ok(manifest.digest())
}

/// The index's entry for the manifest, which carries the image's names and platform.
fn entry(name: &Name, platform: &Platform, manifest: &Blob) -> Result<Descriptor> {
    let mut descriptor = manifest.descriptor()?;
    descriptor.set_annotations(Some(HashMap::from([
        (ANNOTATION_CONTAINERD_NAME.to_owned(), name.full.clone()),
        (ANNOTATION_REF_NAME.to_owned(), name.tag.clone()),
    ])));
    let platform = PlatformBuilder::default().os(platform.os.clone()).architecture(platform.arch.clone()).build()?;
    descriptor.set_platform(Some(platform));
    Ok(descriptor)
}

/// Appends one member whose header depends on nothing but the arguments.
pub fn append<W: Write>(tar: &mut Builder<W>, path: &Path, kind: EntryType, mode: u32, content: &[u8]) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(content.len() as u64);
    tar.append_data(&mut header, path, content).with_context(|| format!("cannot pack {}", path.display()))
}

pub fn json(document: &impl Serialize) -> Result<Vec<u8>> {
    let mut value = serde_json::to_value(document).context("cannot serialise the image")?;
    value.sort_all_objects();
    Ok(serde_json::to_vec(&value)?)
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
