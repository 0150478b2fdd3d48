//! The image around the layer: config, manifest and index as an OCI image layout in one tar file.
//!
//! Two annotations name the image: `org.opencontainers.image.ref.name` is the standard's (the tag, for skopeo and
//! umoci), `io.containerd.image.name` is containerd's (the whole reference, so that `ctr image import` needs no flag).
//! Documents are serialised with sorted keys, since the annotations of `oci-spec` are hash maps.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use oci_spec::image::{
    ANNOTATION_REF_NAME, Arch, ConfigBuilder, Descriptor, DescriptorBuilder, HistoryBuilder, ImageConfigurationBuilder,
    ImageIndexBuilder, ImageManifestBuilder, MediaType, OciLayoutBuilder, Os, PlatformBuilder, RootFsBuilder,
    Sha256Digest,
};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType};

use crate::layer::append;

/// Where containerd looks for the full name of an imported image.
const ANNOTATION_CONTAINERD_NAME: &str = "io.containerd.image.name";
/// Stands where others put the current time, which would change the digest with every build.
const CREATED: &str = "1970-01-01T00:00:00Z";

/// What the config and the index say about the image.
#[derive(Debug)]
pub struct Image {
    /// `repo/name:tag`.
    pub reference: String,
    pub tag: String,
    pub os: Os,
    pub arch: Arch,
    pub entrypoint: Vec<String>,
    /// `KEY=VALUE` each.
    pub env: Vec<String>,
    pub workdir: String,
}

/// Writes the whole image to `out` (all of it or nothing) and returns the manifest's digest.
pub fn write(out: &Path, image: &Image, layer: &[u8]) -> Result<String> {
    let config = json(&config(image, layer)?)?;
    let manifest = json(
        &ImageManifestBuilder::default()
            .schema_version(2u32)
            .media_type(MediaType::ImageManifest)
            .config(descriptor(MediaType::ImageConfig, &config)?)
            .layers(vec![descriptor(MediaType::ImageLayer, layer)?])
            .build()?,
    )?;
    let index = json(
        &ImageIndexBuilder::default()
            .schema_version(2u32)
            .media_type(MediaType::ImageIndex)
            .manifests(vec![named(image, &manifest)?])
            .build()?,
    )?;
    let tar = pack(&index, &[&config, &manifest, layer])?;
    if let Some(parent) = out.parent() {
        fs::create_dir_all(parent)?;
    }
    let partial = out.with_extension("partial");
    fs::write(&partial, tar)?;
    fs::rename(&partial, out)?;
    Ok(format!("sha256:{}", sha256(&manifest)))
}

fn config(image: &Image, layer: &[u8]) -> Result<impl Serialize + use<>> {
    let process = ConfigBuilder::default()
        .entrypoint(image.entrypoint.clone())
        .env(image.env.clone())
        .working_dir(image.workdir.clone())
        .build()?;
    let history = HistoryBuilder::default().created(CREATED).created_by("oci-tar-builder").build()?;
    Ok(ImageConfigurationBuilder::default()
        .created(CREATED)
        .os(image.os.clone())
        .architecture(image.arch.clone())
        .config(process)
        .rootfs(RootFsBuilder::default().typ("layers").diff_ids(vec![format!("sha256:{}", sha256(layer))]).build()?)
        .history(vec![history])
        .build()?)
}

/// The index's entry for the manifest, which carries the image's names and platform.
fn named(image: &Image, manifest: &[u8]) -> Result<Descriptor> {
    let names = HashMap::from([
        (ANNOTATION_CONTAINERD_NAME.to_owned(), image.reference.clone()),
        (ANNOTATION_REF_NAME.to_owned(), image.tag.clone()),
    ]);
    let platform = PlatformBuilder::default().os(image.os.clone()).architecture(image.arch.clone()).build()?;
    let mut descriptor = descriptor(MediaType::ImageManifest, manifest)?;
    descriptor.set_annotations(Some(names));
    descriptor.set_platform(Some(platform));
    Ok(descriptor)
}

fn descriptor(kind: MediaType, blob: &[u8]) -> Result<Descriptor> {
    let digest: Sha256Digest = sha256(blob).parse()?;
    Ok(DescriptorBuilder::default().media_type(kind).size(blob.len() as u64).digest(digest).build()?)
}

/// The layout's files; the blobs by digest.
fn pack(index: &[u8], blobs: &[&[u8]]) -> Result<Vec<u8>> {
    let marker = json(&OciLayoutBuilder::default().image_layout_version("1.0.0").build()?)?;
    let mut tar = Builder::new(Vec::new());
    append(&mut tar, Path::new("oci-layout"), EntryType::Regular, 0o644, &marker)?;
    append(&mut tar, Path::new("index.json"), EntryType::Regular, 0o644, index)?;
    for blob in blobs {
        append(&mut tar, &Path::new("blobs/sha256").join(sha256(blob)), EntryType::Regular, 0o644, blob)?;
    }
    Ok(tar.into_inner()?)
}

fn json(document: &impl Serialize) -> Result<Vec<u8>> {
    let mut value = serde_json::to_value(document).context("cannot serialise the image")?;
    value.sort_all_objects();
    Ok(serde_json::to_vec(&value)?)
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
