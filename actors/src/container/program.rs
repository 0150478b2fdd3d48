//! Finding the program of a container in its root filesystem.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};

use crate::bundle::Bundle;
use crate::error::{Error, Result};

/// Used when the container's environment has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin:/";

/// A wasm file, read.
#[derive(Debug)]
pub struct Source {
    /// Its name, for messages.
    pub name: String,
    /// `export` of `app.wasm#export`.
    pub export: Option<String>,
    /// The file.
    pub wasm: Vec<u8>,
}

/// Reads the file that the first argument names: a path in the root filesystem (relative ones from the working
/// directory), or a bare name looked up in `PATH`. Links are followed inside the root only. Blocks.
///
/// # Errors
/// `Program`, naming the argument and the cause.
pub fn read(bundle: &Bundle, rootfs: &Path, max_size: u64) -> Result<Source> {
    let entrypoint = &bundle.args[0];
    let (name, export) = match entrypoint.split_once('#') {
        Some((name, export)) if !name.is_empty() && !export.is_empty() => (name, Some(export.to_owned())),
        Some(_) => return Err(refuse(entrypoint, "neither side of the # may be empty in file.wasm#export")),
        None => (entrypoint.as_str(), None),
    };
    let root = open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Error::path("open", rootfs, e))?;
    for candidate in candidates(name, bundle) {
        match open_in(&root, &candidate) {
            Ok(file) => return Ok(Source { name: name.to_owned(), export, wasm: read_file(name, file, max_size)? }),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {}
            Err(rustix::io::Errno::LOOP) => return Err(refuse(name, "too many levels of symbolic links")),
            Err(error) => return Err(refuse(name, &std::io::Error::from(error).to_string())),
        }
    }
    Err(refuse(name, "no such file in the image's root filesystem; the first argument names the wasm file to run"))
}

fn candidates(name: &str, bundle: &Bundle) -> Vec<PathBuf> {
    let mut found = vec![bundle.cwd.join(name)];
    if !name.contains('/') {
        let path = bundle.env.iter().find(|(key, _)| key == "PATH").map_or(DEFAULT_PATH, |(_, value)| value);
        found.extend(
            path.split(':').chain(["/"]).filter(|dir| dir.starts_with('/')).map(|dir| Path::new(dir).join(name)),
        );
    }
    found
}

fn open_in(root: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    // Not blocking: the image may hold a FIFO of this name.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

fn read_file(name: &str, file: OwnedFd, max_size: u64) -> Result<Vec<u8>> {
    let stat = fstat(&file).map_err(|e| refuse(name, &std::io::Error::from(e).to_string()))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        FileType::Directory => return Err(refuse(name, "is a directory; name the wasm file in it")),
        _ => return Err(refuse(name, "is not a regular file")),
    }
    let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
    if size > max_size {
        return Err(refuse(name, &format!("{size} bytes, more than the max_module_size of {max_size}")));
    }
    let mut wasm = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    std::fs::File::from(file).take(max_size).read_to_end(&mut wasm).map_err(|e| refuse(name, &e.to_string()))?;
    Ok(wasm)
}

fn refuse(name: &str, why: &str) -> Error {
    Error::Program(format!("{name}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(arg: &str, path: &str) -> Bundle {
        Bundle {
            path: "/".into(),
            root: "/".into(),
            readonly: false,
            args: vec![arg.into()],
            env: vec![("PATH".into(), path.into())],
            cwd: "/work".into(),
            hostname: None,
            namespaces: Default::default(),
            memory_limit: None,
            annotations: Default::default(),
            hosts: None,
        }
    }

    fn root() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in [("a.wasm", "root"), ("work/b.wasm", "cwd"), ("bin/c.wasm", "path")] {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn a_program_is_found_as_a_shell_user_expects() {
        let root = root();
        for (arg, text) in [
            ("/a.wasm", "root"),
            ("a.wasm", "root"),
            ("b.wasm", "cwd"),
            ("./b.wasm", "cwd"),
            ("../a.wasm", "root"),
            ("../../../../a.wasm", "root"),
            ("c.wasm", "path"),
            ("c.wasm#run", "path"),
        ] {
            let source = read(&bundle(arg, "/nowhere:/bin"), root.path(), 100).unwrap();
            assert_eq!(source.wasm, text.as_bytes(), "{arg}");
            assert_eq!(source.export.is_some(), arg.contains('#'));
        }
    }

    #[test]
    fn links_stay_inside_the_root() {
        let root = root();
        std::os::unix::fs::symlink("/a.wasm", root.path().join("absolute")).unwrap();
        std::os::unix::fs::symlink("../../../../../a.wasm", root.path().join("work/up")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", root.path().join("out")).unwrap();
        std::os::unix::fs::symlink("loop", root.path().join("loop")).unwrap();
        assert_eq!(read(&bundle("/absolute", ""), root.path(), 100).unwrap().wasm, b"root");
        assert_eq!(read(&bundle("/work/up", ""), root.path(), 100).unwrap().wasm, b"root");
        assert!(read(&bundle("/out", ""), root.path(), 100).unwrap_err().to_string().contains("no such file"));
        assert!(read(&bundle("/loop", ""), root.path(), 100).unwrap_err().to_string().contains("symbolic links"));
    }

    #[test]
    fn what_is_no_program_is_refused_with_its_name() {
        let root = root();
        rustix::fs::mknodat(rustix::fs::CWD, root.path().join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .unwrap();
        for (arg, words) in [
            ("/fifo", "not a regular file"),
            ("/work", "is a directory"),
            ("/none.wasm", "no such file"),
            ("/a.wasm#", "file.wasm#export"),
            ("/a.wasm", "max_module_size"),
        ] {
            let error = read(&bundle(arg, ""), root.path(), 3).unwrap_err().to_string();
            assert!(error.starts_with(arg) && error.contains(words), "{error}");
        }
    }
}
