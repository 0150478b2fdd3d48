//! Small files of a container's image: its hosts file, its name servers, its certificates.
//!
//! An image is not to be trusted with the daemon's time and memory: nothing but a regular file is read, never more of it
//! than asked for, and no link leads out of the root filesystem. Blocks: for blocking threads.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};

/// Not blocking: there may be a FIFO of this name.
const READ: OFlags = OFlags::RDONLY.union(OFlags::NONBLOCK).union(OFlags::NOCTTY).union(OFlags::CLOEXEC);

/// The first `limit` bytes of `path` in the root filesystem at `rootfs`, and whether that is all of it.
///
/// # Errors
/// `NotFound` when there is no such file, `InvalidInput` when it is no regular one.
pub fn read_in(rootfs: &Path, path: &Path, limit: u64) -> io::Result<(Vec<u8>, bool)> {
    let root = open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let flags = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    read(openat2(root, path, READ, Mode::empty(), flags)?, limit)
}

/// The same of a file of the host.
///
/// # Errors
/// As [`read_in`].
pub fn read_at(path: &Path, limit: u64) -> io::Result<(Vec<u8>, bool)> {
    read(open(path, READ, Mode::empty())?, limit)
}

fn read(file: OwnedFd, limit: u64) -> io::Result<(Vec<u8>, bool)> {
    let stat = fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut text = Vec::new();
    File::from(file).take(limit + 1).read_to_end(&mut text)?;
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let whole = text.len() <= limit;
    text.truncate(limit);
    Ok((text, whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_within_the_root_and_the_limit() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("a"), "four").unwrap();
        std::os::unix::fs::symlink("/a", root.path().join("link")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.path().join("out")).unwrap();
        let read = |name: &str, limit| read_in(root.path(), Path::new(name), limit);
        assert_eq!(read("/a", 4).unwrap(), (b"four".to_vec(), true));
        assert_eq!(read("/link", 3).unwrap(), (b"fou".to_vec(), false));
        assert_eq!(read_at(&root.path().join("a"), 9).unwrap().0, b"four");
        for (name, kind) in [("/out", io::ErrorKind::NotFound), ("/", io::ErrorKind::InvalidInput)] {
            assert_eq!(read(name, 4).unwrap_err().kind(), kind, "{name}");
        }
        let fifo = root.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert_eq!(read_at(&fifo, 4).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
