//! The files of the command line, read and checked: each becomes a layer, or a file of the root filesystem.
//!
//! Invariant: no two have the same name, since the name is what a user runs them by.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use oci_spec::image::MediaType;

use crate::args::Args;
use crate::wasm::Wasm;

/// A wasm file of `--module` or `--components`.
#[derive(Debug)]
pub struct Module {
    pub path: PathBuf,
    pub name: String,
    pub wasm: Wasm,
    pub content: Vec<u8>,
}

/// A file of `--layer`.
#[derive(Debug)]
pub struct Extra {
    pub media_type: MediaType,
    pub name: String,
    /// What it is, where the type says that it is wasm.
    pub wasm: Option<Wasm>,
    pub content: Vec<u8>,
}

/// The modules, in the order of the command line.
pub fn modules(args: &Args) -> Result<Vec<Module>> {
    let paths = match &args.components {
        Some(folder) => wasm_files(folder)?,
        None => args.module.clone(),
    };
    paths.into_iter().map(module).collect()
}

fn module(path: PathBuf) -> Result<Module> {
    let name = file_name(&path)?.to_owned();
    let content = read(&path)?;
    let wasm = Wasm::parse(&content).with_context(|| path.display().to_string())?;
    Ok(Module { path, name, wasm, content })
}

/// The layers of `--layer`, in the order of the command line.
pub fn extras(args: &Args) -> Result<Vec<Extra>> {
    args.layer.iter().map(|pair| extra(pair).with_context(|| format!("--layer {pair}"))).collect()
}

fn extra(pair: &str) -> Result<Extra> {
    let (media_type, file) = pair.split_once('=').context("expected TYPE=FILE")?;
    if !is_media_type(media_type) {
        bail!("`{media_type}` is no media type; expected one like application/vnd.wasm.content.layer.v1+wasm");
    }
    let path = Path::new(file);
    let content = read(path)?;
    let is_wasm = media_type == "application/wasm" || media_type.ends_with("+wasm");
    let wasm = is_wasm.then(|| Wasm::parse(&content)).transpose().with_context(|| path.display().to_string())?;
    Ok(Extra { media_type: MediaType::from(media_type), name: file_name(path)?.to_owned(), wasm, content })
}

/// `type/subtype` of the characters that RFC 6838 allows.
fn is_media_type(text: &str) -> bool {
    let word = |word: &str| {
        word.starts_with(|c: char| c.is_ascii_alphanumeric())
            && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$&-^_.+".contains(&byte))
    };
    text.split_once('/').is_some_and(|(first, second)| word(first) && word(second))
}

/// Refuses names that would not tell two files apart.
pub fn distinct<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<()> {
    let mut seen = BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            bail!("two files are called {name}: rename one, it is run by its name");
        }
    }
    Ok(())
}

fn wasm_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let named = || format!("--components {}", folder.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(named)? {
        let path = entry.with_context(named)?.path();
        if path.extension().is_some_and(|extension| extension == "wasm") {
            files.push(path);
        }
    }
    if files.is_empty() {
        bail!("{}: the folder has no .wasm file", named());
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn file_name(path: &Path) -> Result<&str> {
    let name = path.file_name().with_context(|| format!("{}: names no file", path.display()))?;
    name.to_str().with_context(|| format!("{}: the name is not UTF-8", path.display()))
}
