//! Makes a component of a preview-1 module, and checks what it made. `build.sh` calls it.
//!
//!     componentize new MODULE COMPONENT [WIT]    WIT: a file with one world, the exports besides `wasi:cli/run`
//!     componentize check FILE...                 validates; a line for each: size, memory and exports
//!
//!     module ──► + section "component-type" of WIT ──► + preview-1 adapter ──► component ──► validated
//!
//! The adapter is the command's, which exports `wasi:cli/run`, where the module has a `_start`; else it is a library that
//! exports what its own bindings say, and gets the reactor's.
//!
//! No file is written before its contents are valid, and then under another name first: nobody reads half of one.
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use wasi_preview1_component_adapter_provider::{
    WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_COMMAND_ADAPTER, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
};
use wasmparser::{Encoding, Parser, Payload, Validator, WasmFeatures};
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("componentize: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[PathBuf]) -> Result<()> {
    let Some((verb, files)) = arguments.split_first() else { bail!("new or check? The header of main.rs says more") };
    match (verb.to_str(), files) {
        (Some("new"), [module, component]) => new(module, component, None),
        (Some("new"), [module, component, wit]) => new(module, component, Some(wit)),
        (Some("check"), files) => files.iter().try_for_each(|file| check(file)),
        _ => bail!("`{}` with {} files: no such use; the header of main.rs says which", verb.display(), files.len()),
    }
}

fn new(module: &Path, component: &Path, wit: Option<&PathBuf>) -> Result<()> {
    let mut bytes = read(module)?;
    if let Some(wit) = wit {
        embed(&mut bytes, wit).with_context(|| format!("the world of {}", wit.display()))?;
    }
    let encoded = encode(&bytes).with_context(|| format!("a component of {}", module.display()))?;
    let unfinished = component.with_extension("unfinished");
    fs::write(&unfinished, encoded).with_context(|| format!("write {}", unfinished.display()))?;
    fs::rename(&unfinished, component).with_context(|| format!("write {}", component.display()))
}

/// Leaves in the module the description of its exports that bindings would have left there.
fn embed(module: &mut Vec<u8>, wit: &Path) -> Result<()> {
    let mut resolve = Resolve::default();
    let package = resolve.push_file(wit)?;
    let world = resolve.select_world(&[package], None)?;
    embed_component_metadata(module, &resolve, world, StringEncoding::UTF8)
}

fn encode(module: &[u8]) -> Result<Vec<u8>> {
    let adapter = if exports_start(module)? {
        WASI_SNAPSHOT_PREVIEW1_COMMAND_ADAPTER
    } else {
        WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER
    };
    ComponentEncoder::default()
        .module(module)?
        .adapter(WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, adapter)?
        .validate(true)
        .encode()
}

fn exports_start(module: &[u8]) -> Result<bool> {
    for payload in Parser::new(0).parse_all(module) {
        if let Payload::ExportSection(section) = payload? {
            for export in section {
                if export?.name == "_start" {
                    return Ok(true);
                }
            }
        }
    }
    Ok(false)
}

fn check(file: &Path) -> Result<()> {
    let bytes = read(file)?;
    describe(file, &bytes).with_context(|| format!("{}: not valid", file.display()))
}

fn describe(file: &Path, bytes: &[u8]) -> Result<()> {
    Validator::new_with_features(WasmFeatures::default()).validate_all(bytes)?;
    let mut facts = Facts::default();
    let mut depth = 0;
    for payload in Parser::new(0).parse_all(bytes) {
        match payload? {
            Payload::Version { encoding, .. } => {
                facts.kind.get_or_insert(if encoding == Encoding::Component { "component" } else { "module" });
                depth += 1;
            }
            Payload::End(_) => depth -= 1,
            Payload::MemorySection(section) => {
                for memory in section {
                    facts.pages.push(memory?.initial);
                }
            }
            Payload::ExportSection(section) if depth == 1 => {
                for export in section {
                    facts.exports.push(export?.name.to_owned());
                }
            }
            Payload::ComponentExportSection(section) if depth == 1 => {
                for export in section {
                    facts.exports.push(export?.name.name.to_owned());
                }
            }
            _ => {}
        }
    }
    facts.print(file, bytes.len());
    Ok(())
}

/// What one file is: enough to see at a glance that it became what was meant.
#[derive(Default)]
struct Facts {
    kind: Option<&'static str>,
    /// Initial pages of each memory it defines, nested modules included.
    pages: Vec<u64>,
    exports: Vec<String>,
}

impl Facts {
    fn print(&self, file: &Path, size: usize) {
        let name = file.file_name().unwrap_or(file.as_os_str()).display();
        let kind = self.kind.unwrap_or("empty");
        println!(
            "{name:<24} {kind:<9} {size:>7} bytes, memory pages {:?}, exports {}",
            self.pages,
            self.exports.join(" ")
        );
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}
