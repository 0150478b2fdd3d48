//! Finding, or making, the place of a mount inside a root filesystem that its image or another container may have
//! prepared to lead elsewhere.
//!
//! Every step is taken from a folder that is open, never through a link: links are read and followed here, `/` and `..`
//! mean the root and what was walked through. So whatever changes meanwhile, the result lies in the root.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path};

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, mkdirat, openat, readlinkat};
use rustix::io::{Errno, Result};

/// As many as the kernel follows.
const MAX_LINKS: usize = 40;

/// What a mount is put over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Folder,
    /// Anything else: the kernel makes no difference.
    File,
}

impl Shape {
    pub fn of(stat: &Stat) -> Self {
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory { Self::Folder } else { Self::File }
    }
}

/// A place in a root filesystem.
#[derive(Debug)]
pub(super) struct Target {
    /// Open as a place, not for reading.
    pub file: OwnedFd,
    pub shape: Shape,
    pub is_root: bool,
    /// It was not there before.
    pub is_new: bool,
}

/// Opens `path` in the root, made (with the folders that lead there) as an empty one of this shape if it is missing.
pub(super) fn open_or_make(root: BorrowedFd<'_>, path: &Path, shape: Shape) -> Result<Target> {
    let root = root.try_clone_to_owned().map_err(|_| Errno::MFILE)?;
    let mut walk = Walk { dirs: vec![root], left: names(path), links: 0, is_new: false };
    while let Some(name) = walk.left.pop_front() {
        if let Some(file) = walk.step(&name, shape)? {
            return Ok(Target { file, shape: Shape::File, is_root: false, is_new: walk.is_new });
        }
    }
    let (is_root, is_new) = (walk.dirs.len() == 1, walk.is_new);
    let file = walk.dirs.pop().ok_or(Errno::NOENT)?;
    Ok(Target { file, shape: Shape::Folder, is_root, is_new })
}

struct Walk {
    /// The folders walked through, the root first; never empty.
    dirs: Vec<OwnedFd>,
    left: VecDeque<OsString>,
    links: usize,
    /// The last one was made.
    is_new: bool,
}

impl Walk {
    /// One name further. Gives the file at the end of the path.
    fn step(&mut self, name: &OsStr, shape: Shape) -> Result<Option<OwnedFd>> {
        if name == ".." {
            if self.dirs.len() > 1 {
                self.dirs.pop();
            }
            return Ok(None);
        }
        let dir = self.dirs.last().ok_or(Errno::NOENT)?;
        let is_last = self.left.is_empty();
        self.is_new = false;
        let found = match open(dir, name) {
            Err(Errno::NOENT) => {
                make(dir, name, if is_last { shape } else { Shape::Folder })?;
                self.is_new = true;
                open(dir, name)?
            }
            found => found?,
        };
        match FileType::from_raw_mode(fstat(&found)?.st_mode) {
            FileType::Directory => self.dirs.push(found),
            FileType::Symlink => self.follow(&found)?,
            _ if is_last => return Ok(Some(found)),
            _ => return Err(Errno::NOTDIR),
        }
        Ok(None)
    }

    fn follow(&mut self, link: &OwnedFd) -> Result<()> {
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(Errno::LOOP);
        }
        let to = OsString::from_vec(readlinkat(link, "", Vec::new())?.into_bytes());
        let to = Path::new(&to);
        if to.is_absolute() {
            self.dirs.truncate(1);
        }
        for name in names(to).into_iter().rev() {
            self.left.push_front(name);
        }
        Ok(())
    }
}

fn open(dir: &OwnedFd, name: &OsStr) -> Result<OwnedFd> {
    openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// With the modes that runc gives them.
fn make(dir: &OwnedFd, name: &OsStr, shape: Shape) -> Result<()> {
    let mode = Mode::from_raw_mode(0o755);
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = match shape {
        Shape::Folder => mkdirat(dir, name, mode),
        Shape::File => openat(dir, name, flags, mode).map(drop),
    };
    match made {
        Err(Errno::EXIST) => Ok(()),
        made => made,
    }
}

fn names(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    use super::*;

    struct Root {
        folder: tempfile::TempDir,
        fd: OwnedFd,
    }

    impl Root {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            std::fs::create_dir(folder.path().join("root")).unwrap();
            let fd = std::fs::File::open(folder.path().join("root")).unwrap().into();
            Self { folder, fd }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join("root").join(name)
        }

        /// Where it leads, relative to the folder around the root.
        fn find(&self, path: &str, shape: Shape) -> Result<String> {
            let target = open_or_make(self.fd.as_fd(), Path::new(path), shape)?;
            let real = super::super::attach::path_of(&target.file).unwrap();
            let folder = self.folder.path().canonicalize().unwrap();
            Ok(real.strip_prefix(folder).unwrap().display().to_string())
        }
    }

    #[test]
    fn what_is_missing_is_made() {
        let root = Root::new();
        assert_eq!(root.find("/a/b/c", Shape::Folder).unwrap(), "root/a/b/c");
        assert_eq!(root.find("/a/b/file", Shape::File).unwrap(), "root/a/b/file");
        assert!(root.path("a/b/c").is_dir() && root.path("a/b/file").is_file());
        assert_eq!(root.find("/a/b/file", Shape::Folder).unwrap(), "root/a/b/file");
    }

    #[test]
    fn links_stay_in_the_root() {
        let root = Root::new();
        std::fs::create_dir(root.folder.path().join("outside")).unwrap();
        let outside = root.folder.path().join("outside");
        symlink(&outside, root.path("absolute")).unwrap();
        symlink("../outside", root.path("up")).unwrap();
        symlink("../../../../../../..", root.path("top")).unwrap();
        let inside = outside.canonicalize().unwrap();
        let inside = format!("root{}", inside.display());
        assert_eq!(root.find("/absolute", Shape::Folder).unwrap(), inside);
        assert_eq!(root.find("/absolute/x", Shape::File).unwrap(), format!("{inside}/x"));
        assert_eq!(root.find("/up/y", Shape::File).unwrap(), "root/outside/y");
        assert_eq!(root.find("/top/z", Shape::File).unwrap(), "root/z");
        assert_eq!(root.find("/../../z", Shape::File).unwrap(), "root/z");
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn a_dangling_link_is_followed_and_its_end_made() {
        let root = Root::new();
        symlink("/run", root.path("var-run")).unwrap();
        assert_eq!(root.find("/var-run/secrets", Shape::Folder).unwrap(), "root/run/secrets");
    }

    #[test]
    fn loops_and_files_on_the_way_are_errors() {
        let root = Root::new();
        symlink("b", root.path("a")).unwrap();
        symlink("a", root.path("b")).unwrap();
        std::fs::write(root.path("file"), "").unwrap();
        assert_eq!(root.find("/a", Shape::File).unwrap_err(), Errno::LOOP);
        assert_eq!(root.find("/file/x", Shape::File).unwrap_err(), Errno::NOTDIR);
    }

    #[test]
    fn the_root_itself_is_told() {
        let root = Root::new();
        symlink("/", root.path("slash")).unwrap();
        for path in ["/", "/..", "/slash", "/slash/."] {
            assert!(open_or_make(root.fd.as_fd(), Path::new(path), Shape::Folder).unwrap().is_root, "{path}");
        }
        assert!(!open_or_make(root.fd.as_fd(), Path::new("/x"), Shape::Folder).unwrap().is_root);
    }
}
