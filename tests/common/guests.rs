//! Where the guest programs are: built ones outside the clone (`make guests`), text ones under `tests/guests/wat`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::base;

/// The guests that Rust builds. Besides them there are `js.wasm` and `py.wasm`, too large for an image that every case
/// imports: the cases about them pack their own.
pub const BUILT: [&str; 13] = [
    "hello.wasm",
    "hello-component.wasm",
    "kit.wasm",
    "kit-component.wasm",
    "exports.wasm",
    "exports-component.wasm",
    "cli3.wasm",
    "net.wasm",
    "net3.wasm",
    "connect.wasm",
    "hello-http.wasm",
    "web.wasm",
    "web3.wasm",
];

/// The file of a built guest.
pub fn built(name: &str) -> Result<PathBuf> {
    let folder = match std::env::var_os("TROUPE_GUESTS") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache/troupe/guests"),
    };
    let file = folder.join(name);
    if !file.is_file() {
        bail!("the guest {} is not built: run `make guests`", file.display());
    }
    Ok(file)
}

/// The sources in the text format.
pub fn text_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guests/wat")
}

/// Every text guest, compiled to `<base>/wat/NAME.wasm`.
pub fn compiled_texts() -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(text_folder()).context("tests/guests/wat")? {
        let source = entry?.path();
        if source.extension().is_some_and(|extension| extension == "wat") {
            files.push(compile(&source)?);
        }
    }
    files.sort();
    Ok(files)
}

fn compile(source: &Path) -> Result<PathBuf> {
    let stem = source.file_stem().context("a file without a name")?;
    let file = base::folder("wat")?.join(stem).with_extension("wasm");
    if !file.exists() {
        let binary = wat::parse_file(source).with_context(|| format!("{} is no wat", source.display()))?;
        fs::write(&file, binary)?;
    }
    Ok(file)
}

/// A module written in the case itself.
pub fn inline(name: &str, text: &str) -> Result<PathBuf> {
    let file = base::folder("inline")?.join(name);
    fs::write(&file, wat::parse_str(text).with_context(|| format!("{name} is no wat"))?)?;
    Ok(file)
}
