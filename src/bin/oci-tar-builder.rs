//! `oci-tar-builder`: packs wasm modules into an image that `ctr image import` understands, without docker or buildah.
//!
//! ```text
//! command line ──> source (wasm files, checked) ──> image of one of three kinds ──> layout: one tar file, OUT
//!                                                     wasm layers (default), --as-artifact, --rootfs (layer)
//! ```
//! The options of the builder that people know from the older wasm shims keep their names and meaning. Invariant: the
//! same input gives the same bytes, hence the same digest: nothing here reads a clock, a file's owner or an iteration
//! order.

#![forbid(unsafe_code)]

#[path = "oci-tar-builder/args.rs"]
mod args;
#[path = "oci-tar-builder/image.rs"]
mod image;
#[path = "oci-tar-builder/layer.rs"]
mod layer;
#[path = "oci-tar-builder/layout.rs"]
mod layout;
#[path = "oci-tar-builder/output.rs"]
mod output;
#[path = "oci-tar-builder/source.rs"]
mod source;
#[path = "oci-tar-builder/wasm.rs"]
mod wasm;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use args::Args;

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
    let name = args.reference()?;
    let image = if args.rootfs {
        image::rootfs(args)?
    } else if args.as_artifact {
        image::artifact(args)?
    } else {
        image::of_wasm_layers(args)?
    };
    output::replace(&args.out_path, |file| layout::write(file, &name, &image))
        .with_context(|| format!("cannot write the image to {}", args.out_path.display()))
}

#[cfg(test)]
#[path = "oci-tar-builder/tests.rs"]
mod tests;
