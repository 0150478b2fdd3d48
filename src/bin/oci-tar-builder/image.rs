//! The three kinds of images, each as the blobs it consists of.
//!
//! | kind | config | layers | who takes it |
//! |---|---|---|---|
//! | wasm layers | image config | a wasm file each | containerd 1.7 and later |
//! | artifact | `application/vnd.wasm.config.v0+json` | a wasm file each | registries, CRI |
//! | scratch | image config | one tar | all |
//!
//! The title annotation of a layer is the file's name: a runtime finds the module by it.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};
use oci_spec::image::{
    Arch, ConfigBuilder, HistoryBuilder, ImageConfiguration, ImageConfigurationBuilder, MediaType, Os, RootFsBuilder,
};
use serde::Serialize;

use crate::args::{Args, Platform};
use crate::layer::Entries;
use crate::layout::{Blob, Image, json, sha256};
use crate::source::{self, Extra, Module};
use crate::wasm::Wasm;

/// The layer type of the older wasm shims; they use it for modules and components alike.
const WASM_LAYER: &str = "application/vnd.bytecodealliance.wasm.component.layer.v0+wasm";
/// The types of an artifact.
const ARTIFACT_CONFIG: &str = "application/vnd.wasm.config.v0+json";
const ARTIFACT_LAYER: &str = "application/wasm";
/// Makes configs of different modules differ, where no root filesystem does: containerd knows an image by its config.
const LABEL_LAYERS: &str = "containerd.runwasi.layers";
/// Stands where others put the current time, which would change the digest with every build.
const CREATED: &str = "1970-01-01T00:00:00Z";

/// An image config over layers of wasm.
pub fn of_wasm_layers(args: &Args) -> Result<Image> {
    let (modules, extras) = (source::modules(args)?, source::extras(args)?);
    let names = runnable(&modules, &extras);
    if names.is_empty() {
        bail!("there is no wasm: give a --module, or a --layer of a wasm type");
    }
    let entrypoint = entrypoint(args, &names, "");
    let layers = layers(MediaType::from(WASM_LAYER), modules, extras)?;
    let platform = args.platform.clone().unwrap_or_else(|| Platform::wasm("wasip1"));
    let tars = layers.iter().filter(|layer| is_tar(&layer.media_type));
    let diff_ids = tars.map(diff_id).collect::<Result<_>>()?;
    let digests: String = layers.iter().map(|layer| sha256(&layer.content)).collect();
    let labels = [(LABEL_LAYERS.to_owned(), sha256(digests.as_bytes()))];
    let process = ConfigBuilder::default().labels(HashMap::from(labels));
    let config = image_config(args, &platform, process, entrypoint, diff_ids)?;
    Ok(Image { platform, config: Blob::new(MediaType::ImageConfig, json(&config)?), layers })
}

/// A scratch image: the modules and files in one tar.
pub fn rootfs(args: &Args) -> Result<Image> {
    let modules = source::modules(args)?;
    let mut entries = Entries::default();
    for module in &modules {
        entries.add(&module.path, module.name.as_ref())?;
    }
    for pair in &args.file {
        let (source, destination) = pair.split_once(':').with_context(|| format!("--file {pair}: expected SRC:DST"))?;
        entries.add(source.as_ref(), destination.as_ref())?;
    }
    let entrypoint = entrypoint(args, &runnable(&modules, &[]), "/");
    let platform = args.platform.clone().unwrap_or(Platform { os: Os::Linux, arch: Arch::default() });
    let layer = Blob::new(MediaType::ImageLayer, entries.to_tar()?);
    let config = image_config(args, &platform, ConfigBuilder::default(), entrypoint, vec![layer.digest()])?;
    Ok(Image { platform, config: Blob::new(MediaType::ImageConfig, json(&config)?), layers: vec![layer] })
}

/// What a wasm artifact says about itself; no maintained crate has the type without a registry client around it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct WasmConfig {
    created: &'static str,
    architecture: Arch,
    os: Os,
    layer_digests: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    component: Option<ComponentConfig>,
}

#[derive(Debug, Serialize)]
struct ComponentConfig {
    exports: Vec<String>,
    imports: Vec<String>,
}

/// A wasm OCI artifact. Its config describes the first wasm layer and names no entrypoint: it has no place for one.
pub fn artifact(args: &Args) -> Result<Image> {
    let (modules, extras) = (source::modules(args)?, source::extras(args)?);
    let described = match modules.first() {
        Some(module) => &module.wasm,
        None => extras
            .first()
            .and_then(|extra| extra.wasm.as_ref())
            .context("an artifact begins with wasm: give a --module, or a wasm type to the first --layer")?,
    };
    if let Some(extra) = extras.iter().find(|extra| is_tar(&extra.media_type)) {
        bail!("--layer {}=…: an artifact has no root filesystem", extra.media_type);
    }
    let component = match described {
        Wasm::Module => None,
        Wasm::Component { imports, exports } => {
            Some(ComponentConfig { exports: exports.clone(), imports: imports.clone() })
        }
    };
    let platform = Platform::wasm(if component.is_some() { "wasip2" } else { "wasip1" });
    let layers = layers(MediaType::from(ARTIFACT_LAYER), modules, extras)?;
    if layers.len() > 1 {
        eprintln!(
            "oci-tar-builder: note: an artifact has no entrypoint: name one of its modules when you run it; other runtimes \
             may refuse an artifact of several layers"
        );
    }
    let config = WasmConfig {
        created: CREATED,
        architecture: platform.arch.clone(),
        os: platform.os.clone(),
        layer_digests: layers.iter().map(Blob::digest).collect(),
        component,
    };
    Ok(Image { platform, config: Blob::new(MediaType::from(ARTIFACT_CONFIG), json(&config)?), layers })
}

/// The layers in the order of the command line, modules first; each says which file it is.
fn layers(kind: MediaType, modules: Vec<Module>, extras: Vec<Extra>) -> Result<Vec<Blob>> {
    let names = modules.iter().map(|module| &module.name).chain(extras.iter().map(|extra| &extra.name));
    source::distinct(names.map(String::as_str))?;
    let modules = modules.into_iter().map(|module| Blob::named(kind.clone(), module.content, module.name));
    let extras = extras.into_iter().map(|extra| Blob::named(extra.media_type, extra.content, extra.name));
    Ok(modules.chain(extras).collect())
}

/// The names of all that is wasm.
fn runnable(modules: &[Module], extras: &[Extra]) -> Vec<String> {
    let extras = extras.iter().filter(|extra| extra.wasm.is_some()).map(|extra| extra.name.clone());
    modules.iter().map(|module| module.name.clone()).chain(extras).collect()
}

/// The entrypoint: as given, the only module, or the one that is called as the image is. Nothing else has a default:
/// guessing one would run the wrong one.
fn entrypoint(args: &Args, names: &[String], prefix: &str) -> Vec<String> {
    if !args.entrypoint.is_empty() {
        return args.entrypoint.clone();
    }
    let same = format!("{}.wasm", args.name.rsplit('/').next().unwrap_or_default());
    match names {
        [] => Vec::new(),
        [only] => vec![format!("{prefix}{only}")],
        several if several.contains(&same) => vec![format!("{prefix}{same}")],
        _ => {
            eprintln!("oci-tar-builder: note: none of the modules is called {same}: name one when you run the image");
            Vec::new()
        }
    }
}

/// The config that images with and without a root filesystem share.
fn image_config(
    args: &Args,
    platform: &Platform,
    mut process: ConfigBuilder,
    entrypoint: Vec<String>,
    diff_ids: Vec<String>,
) -> Result<ImageConfiguration> {
    process = process.env(args.environment()?).working_dir(args.absolute_workdir()?);
    if !entrypoint.is_empty() {
        process = process.entrypoint(entrypoint);
    }
    let step = HistoryBuilder::default().created(CREATED).created_by("oci-tar-builder").build()?;
    Ok(ImageConfigurationBuilder::default()
        .created(CREATED)
        .os(platform.os.clone())
        .architecture(platform.arch.clone())
        .config(process.build()?)
        .history(vec![step; diff_ids.len()])
        .rootfs(RootFsBuilder::default().typ("layers").diff_ids(diff_ids).build()?)
        .build()?)
}

/// The digest of a layer's tar, which an image config lists.
fn diff_id(layer: &Blob) -> Result<String> {
    if layer.media_type != MediaType::ImageLayer {
        bail!("--layer {}=…: give the tar uncompressed, as {}", layer.media_type, MediaType::ImageLayer);
    }
    Ok(layer.digest())
}

/// Whether containerd would unpack it into a root filesystem.
fn is_tar(media_type: &MediaType) -> bool {
    let text = media_type.to_string();
    text.starts_with("application/vnd.oci.image.layer.") || text.starts_with("application/vnd.docker.image.rootfs.")
}
