//! What `docker save` writes, where it is no OCI layout: a list of images, each with the names of its layers' files.
//!
//! ```text
//!   manifest.json ─▶ config (digests of the unpacked layers)
//!                └─▶ <id>/layer.tar …
//! ```
//! Called by `layout.rs`, which has the files. The layers' media types are not told; they are file systems all.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::layers::{Checked, Modules, plain};
use super::layout::{Layout, document};
use super::unpack::unpacked;
use crate::image::Descriptor;

/// The list.
pub const LIST: &str = "manifest.json";

/// Of a file system that nobody has packed.
const LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Image {
    config: String,
    #[serde(default)]
    layers: Vec<String>,
}

#[derive(Deserialize)]
struct Config {
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// Adds the modules of all images in the list.
pub fn images(layout: &Layout, found: &mut Modules) -> Result<()> {
    let images: Vec<Image> = read(layout, LIST)?;
    for image in images {
        let config: Config = read(layout, &image.config)?;
        let diff_ids = config.rootfs.diff_ids;
        if diff_ids.len() != image.layers.len() {
            let (layers, digests) = (image.layers.len(), diff_ids.len());
            bail!("{}: has the digests of {digests} layers, and the image has {layers}", image.config);
        }
        let layers: Vec<_> = diff_ids.into_iter().map(layer).collect();
        let files = layers.iter().zip(&image.layers);
        let files: Vec<_> = files.collect();
        found
            .image(&layers, |layer| {
                let file = files.iter().find(|(known, _)| std::ptr::eq(*known, layer));
                let (_, file) = file.context("a layer without a file")?;
                Checked::of_digest(layer, Box::new(unpacked(layout.open(Path::new(file))?.0)?))
            })
            .context(image.config)?;
    }
    Ok(())
}

fn layer(digest: String) -> Descriptor {
    Descriptor { media_type: LAYER.to_owned(), digest, ..Default::default() }
}

fn read<T: serde::de::DeserializeOwned>(layout: &Layout, name: &str) -> Result<T> {
    let (from, size) = layout.open(&plain(Path::new(name)))?;
    document(from, size).with_context(|| name.to_owned())
}
