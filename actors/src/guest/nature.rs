//! What a component is for, told from the names it exports and imports, before it is compiled: the best engine depends
//! on it.
//!
//! Pure. Only the outer component's import and export sections are read; the modules and components inside are skipped by
//! their length. Bytes that make no sense are nobody's nature: the compiler names what is wrong with them.

use wasmparser::{Parser, Payload};

use super::engine::{Bounds, Kind};

/// What a wasm file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nature {
    /// Runs once.
    Command,
    /// Exports `wasi:http/incoming-handler@0.2.x`.
    Http,
    /// Exports `wasi:http/handler@0.3.x`, or uses anything else of WASI 0.3.
    Concurrent,
}

impl Nature {
    /// Looks at a component.
    pub fn of(component: &[u8]) -> Self {
        let mut names = Names::default();
        // What cannot be read any further has no more names.
        let _ = names.read(component);
        if names.concurrent {
            Self::Concurrent
        } else if names.http {
            Self::Http
        } else {
            Self::Command
        }
    }

    /// The engine for it.
    pub fn kind(self, bounds: Bounds) -> Kind {
        match self {
            Self::Command => Kind::Command,
            Self::Http => Kind::Http(bounds),
            Self::Concurrent => Kind::Concurrent,
        }
    }
}

#[derive(Default)]
struct Names {
    http: bool,
    concurrent: bool,
}

impl Names {
    fn read(&mut self, component: &[u8]) -> wasmparser::Result<()> {
        let mut parser = Parser::new(0);
        let mut rest = component;
        loop {
            let wasmparser::Chunk::Parsed { consumed, payload } = parser.parse(rest, true)? else { return Ok(()) };
            rest = &rest[consumed..];
            match payload {
                Payload::ComponentExportSection(exports) => {
                    for export in exports {
                        self.export(export?.name.name);
                    }
                }
                Payload::ComponentImportSection(imports) => {
                    for import in imports {
                        self.any(import?.name.name);
                    }
                }
                Payload::ModuleSection { unchecked_range, .. } | Payload::ComponentSection { unchecked_range, .. } => {
                    let length = unchecked_range.end.saturating_sub(unchecked_range.start);
                    rest = rest.get(length..).unwrap_or_default();
                }
                Payload::End(_) => return Ok(()),
                _ => {}
            }
        }
    }

    fn export(&mut self, name: &str) {
        self.any(name);
        self.http |= name.starts_with("wasi:http/incoming-handler@0.2");
    }

    fn any(&mut self, name: &str) {
        self.concurrent |= name.starts_with("wasi:") && name.contains("@0.3");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A component with one import or export of an empty instance.
    fn component(id: u8, name: &str) -> Vec<u8> {
        let mut section = vec![1, 0, u8::try_from(name.len()).unwrap()];
        section.extend(name.as_bytes());
        // An export: an instance, number 0, without a type. An import: an instance of type 0.
        section.extend(if id == 11 { &[5, 0, 0][..] } else { &[5, 0][..] });
        let mut bytes = b"\0asm\x0d\0\x01\0".to_vec();
        // A module inside, to be skipped.
        bytes.extend([1, 8]);
        bytes.extend(b"\0asm\x01\0\0\0");
        bytes.extend([id, u8::try_from(section.len()).unwrap()]);
        bytes.extend(section);
        bytes
    }

    #[test]
    fn names_tell() {
        const IMPORTS: u8 = 10;
        const EXPORTS: u8 = 11;
        for (id, name, nature) in [
            (EXPORTS, "wasi:http/incoming-handler@0.2.0", Nature::Http),
            (EXPORTS, "wasi:http/incoming-handler@0.2.6", Nature::Http),
            (IMPORTS, "wasi:http/incoming-handler@0.2.6", Nature::Command),
            (EXPORTS, "wasi:http/handler@0.3.0", Nature::Concurrent),
            (EXPORTS, "wasi:cli/run@0.2.3", Nature::Command),
            (EXPORTS, "wasi:cli/run@0.3.0", Nature::Concurrent),
            (IMPORTS, "wasi:clocks/monotonic-clock@0.3.0", Nature::Concurrent),
            (EXPORTS, "mine:http/incoming-handler@0.3.0", Nature::Command),
        ] {
            assert_eq!(Nature::of(&component(id, name)), nature, "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(mut bytes in prop::collection::vec(any::<u8>(), 0..300), at in 0..40_usize, value: u8) {
            Nature::of(&bytes);
            let mut component = component(11, "wasi:http/incoming-handler@0.2.0");
            component[at] = value;
            Nature::of(&component);
            component.append(&mut bytes);
            Nature::of(&component);
        }
    }
}
