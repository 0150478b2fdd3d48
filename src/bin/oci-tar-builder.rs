//! `oci-tar-builder`: packs wasm modules into an image that `ctr image import` understands, without docker or buildah.
//!
//! ```text
//! command line ──> Entries (what lies where in the root filesystem) ──> layer tar ──> config, manifest, index ──> OUT
//! ```
//! The options of the builder that people know from the older wasm shims keep their names. Invariant: the same input
//! gives the same bytes, hence the same digest: nothing here reads a clock, a file's owner or an iteration order.

#![forbid(unsafe_code)]

#[path = "oci-tar-builder/layer.rs"]
mod layer;
#[path = "oci-tar-builder/layout.rs"]
mod layout;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use oci_spec::image::{Arch, Os};

use layer::Entries;
use layout::Image;

/// Packs wasm modules into an OCI image layout (one tar file) for `ctr image import`.
#[derive(Debug, Parser)]
#[command(name = "oci-tar-builder", version)]
struct Args {
    /// Name of the image, the last part of the reference: `hello` of `ghcr.io/me/hello:latest`
    #[arg(short, long)]
    name: String,

    /// Registry and path the name is appended to: `ghcr.io/me`
    #[arg(short, long)]
    repo: String,

    /// Tag of the image
    #[arg(short, long, default_value = "latest")]
    tag: String,

    /// A wasm file to pack; may be given several times
    #[arg(short, long, value_name = "FILE", required = true)]
    module: Vec<PathBuf>,

    /// The tar file to write
    #[arg(short, long, visible_alias = "output", value_name = "OUT")]
    out_path: PathBuf,

    /// Make a scratch image: the modules are files in `/` of an ordinary root filesystem
    #[arg(long)]
    rootfs: bool,

    /// Make an OCI wasm artifact (not supported yet)
    #[arg(short, long, conflicts_with = "rootfs")]
    as_artifact: bool,

    /// Add a layer of a media type (not supported yet)
    #[arg(short, long, value_name = "TYPE=FILE")]
    layer: Vec<String>,

    /// A further file of the root filesystem; may be given several times
    #[arg(long, value_name = "SRC:DST")]
    file: Vec<String>,

    /// One argument of the entrypoint, repeatable; by default `/NAME.wasm` when there is one module
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    entrypoint: Vec<String>,

    /// An environment variable of the image; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    env: Vec<String>,

    /// The directory containers of the image start in
    #[arg(long, value_name = "DIR", default_value = "/")]
    workdir: String,

    /// The architecture of the platform `linux/<arch>`; by default this machine's
    #[arg(long, value_name = "ARCH")]
    arch: Option<String>,
}

fn main() -> ExitCode {
    match build(&Args::parse()) {
        Ok(digest) => {
            println!("{digest}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("oci-tar-builder: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Writes the image and returns the digest of its manifest.
fn build(args: &Args) -> Result<String> {
    if args.as_artifact || !args.layer.is_empty() || !args.rootfs {
        bail!("images of wasm layers and OCI wasm artifacts are not supported yet: use --rootfs for a scratch image");
    }
    let image = Image {
        reference: format!("{}/{}:{}", args.repo.trim_end_matches('/'), args.name, args.tag),
        tag: args.tag.clone(),
        os: Os::Linux,
        arch: args.arch.as_deref().map_or_else(Arch::default, Arch::from),
        entrypoint: entrypoint(args)?,
        env: environment(&args.env)?,
        workdir: absolute(&args.workdir)?,
    };
    let layer = entries(args)?.to_tar()?;
    layout::write(&args.out_path, &image, &layer)
        .with_context(|| format!("cannot write the image to {}", args.out_path.display()))
}

/// Everything the root filesystem holds.
fn entries(args: &Args) -> Result<Entries> {
    let mut entries = Entries::default();
    for module in &args.module {
        entries.add(module, Path::new(file_name(module)?))?;
    }
    for pair in &args.file {
        let (source, destination) = pair.split_once(':').with_context(|| format!("--file {pair}: expected SRC:DST"))?;
        entries.add(Path::new(source), Path::new(destination))?;
    }
    Ok(entries)
}

/// The entrypoint: as given, or the only module. Several modules have no default: guessing one would run the wrong one.
fn entrypoint(args: &Args) -> Result<Vec<String>> {
    match (&args.entrypoint[..], &args.module[..]) {
        ([], [module]) => Ok(vec![format!("/{}", file_name(module)?)]),
        (given, _) => Ok(given.to_vec()),
    }
}

fn file_name(module: &Path) -> Result<&str> {
    let name = module.file_name().with_context(|| format!("--module {}: names no file", module.display()))?;
    name.to_str().with_context(|| format!("--module {}: the name is not UTF-8", module.display()))
}

fn environment(variables: &[String]) -> Result<Vec<String>> {
    for variable in variables {
        if variable.split_once('=').is_none_or(|(key, _)| key.is_empty()) {
            bail!("--env {variable}: expected KEY=VALUE");
        }
    }
    Ok(variables.to_vec())
}

fn absolute(directory: &str) -> Result<String> {
    if !directory.starts_with('/') {
        bail!("--workdir {directory}: expected an absolute path");
    }
    Ok(directory.to_owned())
}

#[cfg(test)]
#[path = "oci-tar-builder/tests.rs"]
mod tests;
