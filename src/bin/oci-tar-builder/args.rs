//! The command line: what the options are called, and the mistakes that show before any file is read.
//!
//! The names, short forms and defaults that the builder of the older wasm shims has are kept; `--rootfs` and what
//! follows it are this project's own.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use clap::Parser;
use oci_spec::distribution::Reference;
use oci_spec::image::{Arch, Os};

use crate::layout::Name;

/// Packs wasm modules and components into an OCI image layout, one tar file, for `ctr image import --all-platforms`.
///
/// Without --as-artifact and --rootfs the image has an image config and a layer of wasm for each module, as the older
/// wasm shims know it (containerd 1.7 and later). On success the digest of the image's manifest is printed; the same
/// input always has the same.
#[derive(Debug, Parser)]
#[command(name = "oci-tar-builder", version, after_help = EXAMPLES)]
pub struct Args {
    /// Name of the image, the last part of the reference: `hello` of `ghcr.io/me/hello:latest`
    #[arg(short, long)]
    pub name: String,

    /// Registry and path the name is appended to: `ghcr.io/me`
    #[arg(short, long)]
    pub repo: String,

    /// Tag of the image
    #[arg(short, long, default_value = "latest")]
    pub tag: String,

    /// A wasm file to pack; may be given several times. Its file name is the name it is run by
    #[arg(short, long, value_name = "FILE", required_unless_present_any = ["components", "layer"])]
    pub module: Vec<PathBuf>,

    /// A folder: packs each of its .wasm files, in the order of their names
    #[arg(short, long, value_name = "DIR", conflicts_with = "module")]
    pub components: Option<PathBuf>,

    /// A further layer, FILE as it is, of the media type TYPE; may be given several times
    #[arg(short, long, value_name = "TYPE=FILE", conflicts_with = "rootfs")]
    pub layer: Vec<String>,

    /// The tar file to write; folders above it are made
    #[arg(short, long, visible_alias = "output", value_name = "OUT")]
    pub out_path: PathBuf,

    /// Make a wasm OCI artifact as the CNCF describes it; its config describes the first module. Of several modules, the
    /// container's first argument names one
    #[arg(short, long, conflicts_with = "rootfs")]
    pub as_artifact: bool,

    /// Make a scratch image: the modules are files in `/` of an ordinary root filesystem, which every containerd takes
    #[arg(long)]
    pub rootfs: bool,

    /// A further file of the root filesystem; may be given several times
    #[arg(long, value_name = "SRC:DST", requires = "rootfs")]
    pub file: Vec<String>,

    /// One argument of the entrypoint, repeatable; by default the only module, or the one called NAME.wasm. An artifact has
    /// none, nor --env and --workdir
    #[arg(long, value_name = "ARG", allow_hyphen_values = true, conflicts_with = "as_artifact")]
    pub entrypoint: Vec<String>,

    /// An environment variable of the image; may be given several times
    #[arg(long, value_name = "KEY=VALUE", conflicts_with = "as_artifact")]
    pub env: Vec<String>,

    /// The directory containers of the image start in
    #[arg(long, value_name = "DIR", default_value = "/", conflicts_with = "as_artifact")]
    pub workdir: String,

    /// `linux/ARCH` (with --rootfs the default, of this machine), `wasi/wasm` or `wasip1/wasm` (without it the default);
    /// an artifact's follows from its module
    #[arg(long, value_name = "OS/ARCH", conflicts_with = "as_artifact")]
    pub platform: Option<Platform>,
}

const EXAMPLES: &str = "\
Examples:
  oci-tar-builder --name app --repo ghcr.io/me --tag v1 --module app.wasm -o app.tar
  oci-tar-builder --name app --repo ghcr.io/me --module app.wasm --as-artifact -o app.tar
  oci-tar-builder --name app --repo ghcr.io/me --module app.wasm --rootfs --file page.html:/srv/page.html -o app.tar
  ctr image import --all-platforms app.tar";

/// What the image says it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    pub os: Os,
    pub arch: Arch,
}

impl Platform {
    pub fn wasm(os: &str) -> Self {
        Self { os: Os::from(os), arch: Arch::Wasm }
    }
}

impl FromStr for Platform {
    type Err = String;

    /// Only what some containerd and this shim take: another platform would be found out when the image is run.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((os @ ("wasi" | "wasip1" | "wasip2"), "wasm")) => Ok(Self::wasm(os)),
            Some(("linux", arch)) => match Arch::from(arch) {
                Arch::Other(_) | Arch::Wasm => Err(format!("{arch} is no architecture of Linux: amd64, arm64, …")),
                arch => Ok(Self { os: Os::Linux, arch }),
            },
            _ => Err("expected linux/ARCH, wasi/wasm, wasip1/wasm or wasip2/wasm".to_owned()),
        }
    }
}

impl Args {
    /// The image's full name, which every containerd and registry must be able to take.
    pub fn reference(&self) -> Result<Name> {
        let full = format!("{}/{}:{}", self.repo.trim_end_matches('/'), self.name, self.tag);
        let parsed = Reference::from_str(&full)
            .with_context(|| format!("{full} of --repo, --name and --tag is not the name of an image"))?;
        if parsed.digest().is_some() || parsed.tag() != Some(self.tag.as_str()) || self.name.contains(':') {
            bail!("{full} of --repo, --name and --tag is not the name of an image: the tag belongs into --tag");
        }
        Ok(Name { full, tag: self.tag.clone() })
    }

    pub fn environment(&self) -> Result<Vec<String>> {
        for variable in &self.env {
            if variable.split_once('=').is_none_or(|(key, _)| key.is_empty()) {
                bail!("--env {variable}: expected KEY=VALUE");
            }
        }
        Ok(self.env.clone())
    }

    pub fn absolute_workdir(&self) -> Result<&str> {
        if !self.workdir.starts_with('/') {
            bail!("--workdir {}: expected an absolute path", self.workdir);
        }
        Ok(&self.workdir)
    }
}
