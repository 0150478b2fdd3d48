//! Which container is native: told by the first bytes of the file that its entrypoint names, before anything is compiled.
//!
//! | the file begins with | it is |
//! |---|---|
//! | `\0asm` | wasm, whatever else there is |
//! | `\x7fELF` (not wasmtime's own), `#!` | native |
//! | anything else | left to `container::program`, whose errors say what it is |
//!
//! wasm is looked for where `program` does, a native program where runc does, which is stricter: only `PATH` for a plain
//! name, and only files that may be executed. Volumes count: a script out of a ConfigMap is one. Blocks.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};

use super::spec::Spec;
use crate::bundle::Bundle;

/// `e_ident[EI_OSABI]` of precompiled wasm, which is never run from an image.
const OSABI_WASMTIME: u8 = 200;

/// Longer ones are no search path but an attempt to keep us busy.
const MAX_FOLDERS: usize = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nature {
    Wasm,
    Native,
    Neither,
}

/// Whether the container is runc's. `paths` are those where a wasm file would be looked for.
pub fn is_native(bundle: &Bundle, paths: &[PathBuf], rootfs: &Path) -> bool {
    let Some(name) = bundle.args.first().filter(|name| !name.is_empty()) else { return false };
    let Ok(root) = open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) else {
        return false;
    };
    let seen = paths.iter().find_map(|path| look(&root, path, false));
    match seen {
        Some(Nature::Wasm) => return false,
        Some(Nature::Native) => return true,
        Some(Nature::Neither) | None => {}
    }
    let spec = Spec::read(&bundle.path).unwrap_or_default();
    let anywhere = |path: &PathBuf| match spec.volume_at(path) {
        Some((source, rest)) => in_volume(&source, &rest),
        None => look(&root, path, !name.contains('/')),
    };
    runcs_paths(name, bundle).iter().find_map(anywhere) == Some(Nature::Native)
}

/// Where runc looks for a program.
fn runcs_paths(name: &str, bundle: &Bundle) -> Vec<PathBuf> {
    if name.contains('/') {
        return vec![bundle.cwd.join(name)];
    }
    let path = bundle.env.iter().find(|(key, _)| key == "PATH").map_or("", |(_, value)| value);
    path.split(':').take(MAX_FOLDERS).map(|folder| bundle.cwd.join(folder).join(name)).collect()
}

fn in_volume(source: &Path, rest: &Path) -> Option<Nature> {
    let root = open(source, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    look(&root, rest, false)
}

/// What the file is, if it is there. Links are followed inside the root only.
fn look(root: &OwnedFd, path: &Path, executable: bool) -> Option<Nature> {
    // Not blocking: the image may hold a FIFO of this name.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS).ok()?;
    let stat = fstat(&file).ok()?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || (executable && stat.st_mode & 0o111 == 0) {
        return None;
    }
    let mut head = Vec::with_capacity(8);
    File::from(file).take(8).read_to_end(&mut head).ok()?;
    Some(nature(&head))
}

fn nature(head: &[u8]) -> Nature {
    match head {
        [0, b'a', b's', b'm', ..] => Nature::Wasm,
        [0x7f, b'E', b'L', b'F', _, _, _, OSABI_WASMTIME, ..] => Nature::Neither,
        [0x7f, b'E', b'L', b'F', ..] | [b'#', b'!', ..] => Nature::Native,
        _ => Nature::Neither,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn put(root: &Path, name: &str, text: &[u8], mode: u32) {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn is_native_in(root: &Path, name: &str, wasm_paths: &[&str]) -> bool {
        let bundle = Bundle {
            path: root.to_owned(),
            args: vec![name.to_owned()],
            env: vec![("PATH".into(), "/usr/bin:/bin".into())],
            cwd: "/work".into(),
            ..Bundle::for_tests()
        };
        is_native(&bundle, &wasm_paths.iter().map(PathBuf::from).collect::<Vec<_>>(), root)
    }

    #[test]
    fn a_program_is_told_by_its_first_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        put(root, "bin/sh", b"\x7fELF\x02\x01\x01\x00more", 0o755);
        put(root, "usr/bin/data", b"hello", 0o644);
        put(root, "bin/data", b"#!/bin/sh\n", 0o755);
        put(root, "work/run.sh", b"#!/bin/sh\n", 0o644);
        put(root, "work/app", b"\0asm\x01\0\0\0", 0o644);
        put(root, "bin/app", b"\x7fELF\x02\x01\x01\x00", 0o755);
        put(root, "old.cwasm", b"\x7fELF\x02\x01\x01\xc8", 0o755);
        put(root, "x", b"#", 0o755);
        std::os::unix::fs::symlink("/bin/sh", root.join("bin/ls")).unwrap();
        for (name, expected) in [
            ("sh", true),
            ("/bin/sh", true),
            ("ls", true),
            // Not executable, so runc goes on.
            ("data", true),
            ("./run.sh", true),
            ("../bin/sh", true),
            ("/old.cwasm", false),
            ("/x", false),
            ("/nothing", false),
            ("/bin", false),
            ("", false),
        ] {
            assert_eq!(is_native_in(root, name, &[]), expected, "{name}");
        }
        assert!(!is_native_in(root, "app", &["/work/app", "/bin/app"]), "wasm comes first");
        assert!(is_native_in(root, "app", &["/none", "/bin/app"]));
    }

    #[test]
    fn a_script_out_of_a_volume_is_one() {
        let (dir, volume) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        put(volume.path(), "..data/run", b"#!/bin/sh\n", 0o755);
        std::os::unix::fs::symlink("..data/run", volume.path().join("run")).unwrap();
        let mount = format!(r#"{{"mounts":[{{"destination":"/config","source":"{}"}}]}}"#, volume.path().display());
        std::fs::write(dir.path().join("config.json"), mount).unwrap();
        assert!(is_native_in(dir.path(), "/config/run", &["/config/run"]));
        assert!(!is_native_in(dir.path(), "/config/none", &["/config/none"]));
    }
}
