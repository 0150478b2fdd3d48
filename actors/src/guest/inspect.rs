//! What a file is, told from its first bytes: the cheap refusals, before any process is started for it.
//!
//! Pure, and the only look the daemon itself takes at untrusted bytes; everything deeper happens in the worker.

use super::LoadError;

/// The two binary formats that are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Module,
    Component,
}

const MAGIC: &[u8] = b"\0asm";
/// `e_ident[EI_OSABI]` of wasmtime's own ELF files.
const OSABI_WASMTIME: u8 = 200;

/// Accepts a module or a component, or says what the file is instead and what to do.
pub(super) fn inspect(bytes: &[u8], max_size: u64) -> Result<Format, LoadError> {
    if bytes.is_empty() {
        return Err(LoadError::not_wasm("is empty; it should be a WebAssembly module or component"));
    }
    check_size(bytes.len() as u64, max_size)?;
    match bytes.strip_prefix(MAGIC) {
        Some(rest) => version(rest),
        None if MAGIC.starts_with(bytes) => Err(truncated(bytes.len())),
        None => Err(foreign(bytes)),
    }
}

/// Refuses what is too large to be worth a look.
pub(super) fn check_size(size: u64, most: u64) -> Result<(), LoadError> {
    if size <= most {
        return Ok(());
    }
    Err(LoadError::too_expensive(format!(
        "has {size} bytes, more than the {most} that `max_module_size` allows; strip its debug information or raise the \
         runtime option `max_module_size`"
    )))
}

/// Whether this is the text format, which has to be read by a worker first.
pub(super) fn is_wat(bytes: &[u8]) -> bool {
    is_text(bytes) && first_word(bytes).starts_with(b"(")
}

/// The four bytes after the magic: version and layer, two bytes each.
fn version(rest: &[u8]) -> Result<Format, LoadError> {
    let Some(field) = rest.first_chunk::<4>() else {
        return Err(truncated(MAGIC.len() + rest.len()));
    };
    let [major, minor, layer, _] = *field;
    match field {
        [1, 0, 0, 0] => Ok(Format::Module),
        [13, 0, 1, 0] => Ok(Format::Component),
        [_, _, 1, 0] => Err(LoadError::invalid(format!(
            "it is a component of the binary version {major}.{minor}, an old draft; build it again with current tools"
        ))),
        _ => Err(LoadError::invalid(format!(
            "its header says version {major}.{minor}, layer {layer}; modules (1.0, layer 0) and components (13.0, layer 1) \
             are supported"
        ))),
    }
}

fn truncated(len: usize) -> LoadError {
    LoadError::invalid(format!("it ends after {len} bytes, inside its header; the file was cut off"))
}

fn foreign(bytes: &[u8]) -> LoadError {
    if bytes.starts_with(b"\x7fELF") {
        return LoadError::not_wasm(elf(bytes));
    }
    let what = match bytes {
        [b'#', b'!', ..] => {
            "is a script; this runtime runs WebAssembly only, and there is no shell to start it".to_owned()
        }
        [0x1f, 0x8b, ..] => "is compressed (gzip); put the unpacked .wasm file into the image".to_owned(),
        [b'P', b'K', 3, 4, ..] => "is a zip archive; put the unpacked .wasm file into the image".to_owned(),
        [b'M', b'Z', ..] => "is a Windows program; this runtime runs WebAssembly only".to_owned(),
        _ if is_text(bytes) => "is a text file: neither WebAssembly (a module, a component, their text), nor a Linux program (ELF), nor a script \
              that begins with #!"
                .to_owned(),
        _ => format!(
            "is neither WebAssembly nor a Linux program: it starts with {}, a module or component with 00 61 73 6d, a program \
             with 7f 45 4c 46, a script with #!",
            bytes.iter().take(4).map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
        ),
    };
    LoadError::not_wasm(what)
}

fn elf(bytes: &[u8]) -> &'static str {
    if bytes.get(7) == Some(&OSABI_WASMTIME) {
        "is precompiled code (.cwasm). It is machine code that nothing can check, so it is never run from an image; \
         put the .wasm file there instead: it is compiled once and then cached"
    } else {
        "is a Linux program (ELF); this runtime runs WebAssembly only. Build it for wasm32-wasip1 or wasm32-wasip2, or \
         run the image with another runtime (runc)"
    }
}

fn is_text(bytes: &[u8]) -> bool {
    let head = &bytes[..bytes.len().min(512)];
    let text = match std::str::from_utf8(head) {
        Ok(text) => text,
        // A character may be cut in two by the end of the window, not by anything before it.
        Err(error) if error.error_len().is_none() => std::str::from_utf8(&head[..error.valid_up_to()]).unwrap_or(""),
        Err(_) => return false,
    };
    !text.is_empty() && text.chars().all(|c| !c.is_control() || c.is_whitespace())
}

/// The text from its first character that is neither space nor comment, as far as one line tells.
fn first_word(bytes: &[u8]) -> &[u8] {
    bytes
        .split(|byte| *byte == b'\n')
        .map(|line| line.trim_ascii())
        .find(|line| !line.is_empty() && !line.starts_with(b";;"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refusal(bytes: &[u8]) -> String {
        inspect(bytes, 1 << 20).unwrap_err().about("/app.wasm").to_string()
    }

    #[test]
    fn modules_and_components_are_told_apart() {
        assert_eq!(inspect(b"\0asm\x01\0\0\0", 100), Ok(Format::Module));
        assert_eq!(inspect(b"\0asm\x0d\0\x01\0", 100), Ok(Format::Component));
    }

    #[test]
    fn other_files_are_called_by_their_name() {
        let precompiled = b"\x7fELF\x02\x01\x01\xc8\0\0\0\0\0\0\0\0";
        for (bytes, word) in [
            (&b""[..], "empty"),
            (b"\0as", "after 3 bytes"),
            (b"\0asm\x01\0", "after 6 bytes"),
            (b"\0asm\x0a\0\x01\0", "old draft"),
            (b"\0asm\x02\0\0\0", "version 2.0"),
            (b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0", "Linux program"),
            (precompiled, "precompiled"),
            (b"#!/bin/sh\n", "script"),
            (b"\x1f\x8b\x08", "gzip"),
            (b"PK\x03\x04", "zip"),
            (b"MZ\x90\0", "Windows"),
            ("Grüße\n".as_bytes(), "text file"),
            (b"\xff\xfe\x00\x01", "ff fe 00 01"),
        ] {
            let text = refusal(bytes);
            assert!(text.contains(word) && text.starts_with("/app.wasm: "), "{bytes:?} gave: {text}");
        }
    }

    #[test]
    fn the_text_format_is_told_from_other_text() {
        for text in ["(module)", "\n ;; hello\n (component)\n", "(; a comment ;) (module)"] {
            assert!(is_wat(text.as_bytes()), "{text:?}");
        }
        for text in ["", "hello (module)", "#!/bin/sh", "\0asm\x01\0\0\0", "(module\0)"] {
            assert!(!is_wat(text.as_bytes()), "{text:?}");
        }
    }

    #[test]
    fn a_file_above_the_limit_names_the_setting() {
        let error = inspect(b"\0asm\x01\0\0\0", 7).unwrap_err();
        assert!(matches!(error, LoadError::TooExpensive { .. }));
        assert!(error.to_string().contains("max_module_size"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1024)) {
            let _ = inspect(&bytes, 1 << 20);
        }

        #[test]
        fn arbitrary_text_is_never_accepted(text in "\\PC{0,300}") {
            prop_assert!(inspect(text.as_bytes(), 1 << 20).is_err());
        }

        #[test]
        fn whatever_follows_a_good_header_is_left_to_the_worker(tail in proptest::collection::vec(any::<u8>(), 0..64)) {
            let bytes = [b"\0asm\x01\0\0\0".as_slice(), &tail].concat();
            prop_assert_eq!(inspect(&bytes, 1 << 20), Ok(Format::Module));
        }
    }
}
