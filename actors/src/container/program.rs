//! Finding the program of a container.
//!
//! ```text
//!   entrypoint ─▶ a file of the root filesystem ─▶ (not there) a layer of the image, through `Images`
//! ```
//! The root filesystem comes first because it is at hand and most images have one: a file that is there costs no question
//! to containerd. Images of wasm layers arrive without one, or, where containerd has unpacked their layers into nothing,
//! with an empty one.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};

use super::entrypoint::Entrypoint;
use crate::ContainerId;
use crate::bundle::Bundle;
use crate::error::{Error, Result};
use crate::image::{Content, Images};

/// Entries of `/` that are looked at when the entrypoint names no file.
const MAX_ENTRIES: usize = 10_000;

/// A wasm file, found.
#[derive(Debug)]
pub struct Source {
    /// Its name, for messages.
    pub name: String,
    /// `export` of `app.wasm#export`.
    pub export: Option<String>,
    pub wasm: Wasm,
}

/// Where it was found.
#[derive(Debug)]
pub enum Wasm {
    /// In the root filesystem; read.
    File(Vec<u8>),
    /// In a layer of the image, whose digest says whether it has to be read.
    Layer(Arc<dyn Content>),
}

/// Finds the module that the first argument names, or the only one when it names none: in the root filesystem, if the
/// container has one and it is there, else among the image's layers. Blocks.
///
/// # Errors
/// `Program`, naming the argument and the cause; `Host` when the image cannot be asked for.
pub fn find(
    id: &ContainerId,
    bundle: &Bundle,
    rootfs: Option<&Path>,
    images: &dyn Images,
    max_size: u64,
) -> Result<Source> {
    let entrypoint = Entrypoint::of(bundle)?;
    if let Some((name, wasm)) = rootfs.map_or(Ok(None), |rootfs| in_rootfs(rootfs, &entrypoint, max_size))? {
        return Ok(Source { name, export: entrypoint.export, wasm: Wasm::File(wasm) });
    }
    let wanted = entrypoint.wanted(max_size);
    match images.module(id, &wanted) {
        Ok(Some(module)) => {
            Ok(Source { name: module.name, export: entrypoint.export, wasm: Wasm::Layer(module.content) })
        }
        Ok(None) => {
            let and = if rootfs.is_some() { NAME_IT } else { ", and its image no wasm layer" };
            Err(Error::Program(missing(&entrypoint, rootfs.is_some()) + and))
        }
        // Most likely an ordinary image, in which the file is simply missing.
        Err(Error::Host { what, source }) => {
            let missing = missing(&entrypoint, rootfs.is_some());
            Err(Error::host(format!("{missing}; the image's layers cannot be looked at: {what}"), source))
        }
        Err(error) => Err(error),
    }
}

const NAME_IT: &str = "; the first argument names the program to run";

fn missing(entrypoint: &Entrypoint, has_root: bool) -> String {
    let why = match (entrypoint.paths.is_empty(), has_root) {
        (false, true) => "no such file in the image's root filesystem",
        (true, true) => "names no file, and there is no wasm file in / of the image's root filesystem",
        (_, false) => "the container has no root filesystem",
    };
    format!("{}: {why}", label(&entrypoint.name))
}

/// Nothing is hard to see in a message.
fn label(name: &str) -> String {
    if name.is_empty() { "the entrypoint \"\"".to_owned() } else { name.to_owned() }
}

/// The file and its name, if it is there. Links are followed inside the root only.
fn in_rootfs(rootfs: &Path, entrypoint: &Entrypoint, max_size: u64) -> Result<Option<(String, Vec<u8>)>> {
    let root = open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Error::path("open", rootfs, e))?;
    let only = if entrypoint.paths.is_empty() { only_file(rootfs, &entrypoint.name)? } else { None };
    let (name, paths) = match &only {
        Some(name) => (name, &[Path::new("/").join(name)][..]),
        None => (&entrypoint.name, &entrypoint.paths[..]),
    };
    for candidate in paths {
        match open_in(&root, candidate) {
            Ok(file) => return Ok(Some((name.clone(), read_file(name, file, max_size)?))),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {}
            Err(rustix::io::Errno::LOOP) => return Err(refuse(name, "too many levels of symbolic links")),
            Err(error) => return Err(refuse(name, &std::io::Error::from(error).to_string())),
        }
    }
    Ok(None)
}

/// The only module among the files of `/`.
fn only_file(rootfs: &Path, name: &str) -> Result<Option<String>> {
    let entries = std::fs::read_dir(rootfs).map_err(|e| Error::path("read", rootfs, e))?;
    let files = entries.take(MAX_ENTRIES).flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
    let mut names: Vec<String> = files
        .filter_map(|file| file.file_name().into_string().ok())
        .filter(|name| Path::new(name).extension().is_some_and(|kind| kind == "wasm" || kind == "wat"))
        .collect();
    match names.len() {
        0 => Ok(None),
        1 => Ok(names.pop()),
        count => {
            names.sort();
            names.truncate(20);
            let names = names.join(", ");
            let why = format!("names no file, and the image has {count} modules in /: {names}; name one of them");
            Err(refuse(&label(name), &why))
        }
    }
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
    use crate::image::{ImageModule, Wanted};

    fn bundle(arg: &str, path: &str) -> Bundle {
        Bundle {
            args: vec![arg.into()],
            env: vec![("PATH".into(), path.into())],
            cwd: "/work".into(),
            ..Bundle::for_tests()
        }
    }

    /// An image whose only layer has this text, or one that cannot be asked for.
    #[derive(Debug)]
    struct Layer(Option<&'static str>);

    impl Images for Layer {
        fn module(&self, _: &ContainerId, wanted: &Wanted) -> Result<Option<ImageModule>> {
            let text = self.0.ok_or_else(|| Error::host("connect", std::io::Error::other("refused")))?;
            Ok((!text.is_empty()).then(|| ImageModule { name: wanted.name.clone(), content: Arc::new(Text) }))
        }
    }

    /// Nobody reads it here.
    #[derive(Debug)]
    struct Text;

    impl Content for Text {
        fn digest(&self) -> [u8; 32] {
            [0; 32]
        }

        fn read(&self) -> Result<Vec<u8>> {
            Err(Error::Internal("it was read".into()))
        }
    }

    impl Source {
        fn file(&self) -> &[u8] {
            let Wasm::File(file) = &self.wasm else { panic!("a layer") };
            file
        }

        fn is_layer(&self) -> bool {
            matches!(self.wasm, Wasm::Layer(_))
        }
    }

    fn find_in(rootfs: Option<&Path>, bundle: &Bundle, layer: Option<&'static str>, max_size: u64) -> Result<Source> {
        find(&ContainerId::new("ns", "c"), bundle, rootfs, &Layer(layer), max_size)
    }

    /// In a root filesystem; asking for layers would fail.
    fn read(bundle: &Bundle, rootfs: &Path, max_size: u64) -> Result<Source> {
        find_in(Some(rootfs), bundle, None, max_size)
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
            assert_eq!(source.file(), text.as_bytes(), "{arg}");
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
        assert_eq!(read(&bundle("/absolute", ""), root.path(), 100).unwrap().file(), b"root");
        assert_eq!(read(&bundle("/work/up", ""), root.path(), 100).unwrap().file(), b"root");
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
            ("/a.wasm#", "file.wasm#function"),
            ("/a.wasm", "max_module_size"),
        ] {
            let error = read(&bundle(arg, ""), root.path(), 3).unwrap_err().to_string();
            assert!(error.starts_with(arg) && error.contains(words), "{error}");
        }
    }

    #[test]
    fn nothing_is_the_only_module_in_the_root() {
        let root = root();
        for argument in ["/", "", "#run"] {
            assert_eq!(read(&bundle(argument, ""), root.path(), 100).unwrap().file(), b"root");
        }
        std::fs::write(root.path().join("b.wat"), "(module)").unwrap();
        let error = read(&bundle("/", ""), root.path(), 100).unwrap_err().to_string();
        assert!(error.starts_with("/: ") && error.contains("2 modules in /: a.wasm, b.wat"), "{error}");
    }

    #[test]
    fn layers_are_asked_for_what_is_not_in_the_root() {
        let root = root();
        let source = find_in(Some(root.path()), &bundle("/layer.wasm#run", ""), Some("layer"), 100).unwrap();
        assert!(source.is_layer() && source.export.as_deref() == Some("run"));
        assert!(find_in(None, &bundle("/a.wasm", ""), Some("layer"), 100).unwrap().is_layer());
        // The file is there: nobody is asked, so nobody can fail.
        assert!(!find_in(Some(root.path()), &bundle("/a.wasm", ""), None, 100).unwrap().is_layer());
        for (rootfs, argument, layer, words) in [
            (Some(root.path()), "/none.wasm", Some(""), "/none.wasm: no such file in the image's root filesystem"),
            (
                Some(root.path()),
                "/none.wasm",
                None,
                "root filesystem; the image's layers cannot be looked at: connect: refused",
            ),
            (None, "/a.wasm", Some(""), "no root filesystem, and its image no wasm layer"),
            (None, "/a.wasm", None, "no root filesystem; the image's layers cannot be looked at: connect: refused"),
            (None, "", Some(""), "the entrypoint \"\": the container has no root"),
        ] {
            let error = find_in(rootfs, &bundle(argument, ""), layer, 100).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
