//! What a wasm file is, told from its sections: the builder refuses what no runtime could run, while the file is at hand.
//!
//! Only the structure is read, no code: whether the instructions are valid is for the runtime, which may know newer ones.

use anyhow::{Context, Result, bail};
use wasmparser::{Encoding, Parser, Payload};

/// `e_ident[EI_OSABI]` of wasmtime's own ELF files.
const OSABI_WASMTIME: u8 = 200;

/// The two binary formats.
#[derive(Debug, PartialEq, Eq)]
pub enum Wasm {
    Module,
    /// The names that the outermost component imports and exports, in the order of the file.
    Component {
        imports: Vec<String>,
        exports: Vec<String>,
    },
}

impl Wasm {
    /// Reads a file's bytes, or says what they are instead.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if !bytes.starts_with(b"\0asm") {
            bail!("{}", foreign(bytes));
        }
        outline(bytes).context("is damaged WebAssembly, build it again")
    }
}

fn outline(bytes: &[u8]) -> Result<Wasm> {
    let (mut imports, mut exports, mut depth, mut component) = (Vec::new(), Vec::new(), 0, false);
    for payload in Parser::new(0).parse_all(bytes) {
        match payload? {
            Payload::Version { encoding, .. } => {
                component |= depth == 0 && encoding == Encoding::Component;
                depth += 1;
            }
            Payload::End(_) => depth -= 1,
            Payload::ComponentImportSection(section) if depth == 1 => {
                for import in section {
                    imports.push(import?.name.name.to_owned());
                }
            }
            Payload::ComponentExportSection(section) if depth == 1 => {
                for export in section {
                    exports.push(export?.name.name.to_owned());
                }
            }
            _ => {}
        }
    }
    Ok(if component { Wasm::Component { imports, exports } } else { Wasm::Module })
}

fn foreign(bytes: &[u8]) -> &'static str {
    if bytes.starts_with(b"\x7fELF") && bytes.get(7) == Some(&OSABI_WASMTIME) {
        return "is precompiled code (.cwasm). It is machine code that nothing can check, so no image may carry it; \
                pack the .wasm file: it is compiled once and then cached";
    }
    match bytes.trim_ascii_start() {
        [] => "is empty; expected a WebAssembly module or component",
        [b'(', ..] | [b';', b';', ..] => {
            "is WebAssembly text; convert it with `wat2wasm` or `wasm-tools parse`, or pack it by --rootfs and --file"
        }
        [0x7f, b'E', b'L', b'F', ..] => "is a Linux program (ELF); build it for wasm32-wasip1 or wasm32-wasip2",
        _ => "is not a WebAssembly module or component: these start with the bytes 00 61 73 6d",
    }
}
