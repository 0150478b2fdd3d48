//! Compiled code on disk: one file for each key, shared by every daemon and version on the machine.
//!
//! ```text
//!   <64 hex digits>  =  code (an ELF file, mapped as it is)  +  trailer: magic 8 | length of the code 8 | SHA-256 32
//!   .turn-<what>        somebody compiles, see turn.rs        .tmp-…  somebody writes; both gone when they are done
//! ```
//! The trailer stands behind the code because wasmtime maps the file from its first byte and does not look past the ELF
//! sections. The digest also covers the key, so a file under another's name is as invalid as a torn one.
//!
//! Invariants. The folder is ours and closed to others (checked at every opening, on the descriptor that is then used).
//! Only the daemon writes here; the worker, which reads untrusted input, never gets a descriptor of this folder. A file
//! gets its name when it is complete and is never written again, only unlinked: so a mapping can neither change nor be
//! cut short under a running guest. There is no fsync: what a power failure tears, the digest finds. After each store the
//! folder is brought back below its limit (`tidy.rs`).
//!
//! Called by `workshop.rs`, on blocking threads only.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use tracing::warn;

use super::LoadError;
use super::tidy;
use super::turn::{self, Turn};

const MAGIC: [u8; 8] = *b"troupe\0\x01";
const TRAILER: u64 = 48;
/// Files that still have no entry's name, where the file system cannot hold files without one.
pub(super) const TEMPORARY: &str = ".tmp-";

/// Names one compiled program: module, engine, build and kind.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key(pub [u8; 32]);

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The open folder.
pub(super) struct Cache {
    dir: OwnedFd,
    path: PathBuf,
}

impl Cache {
    /// Opens the folder, made with its parents where it is missing. The inner error: it cannot be had, which only costs
    /// time. The outer one: it is there, but others could have put code into it.
    pub(super) fn open(path: &Path) -> Result<io::Result<Self>, LoadError> {
        let dir = match open_folder(path) {
            Ok(dir) => dir,
            Err(error) => return Ok(Err(error)),
        };
        check_owner(&dir, path)?;
        Ok(Ok(Self { dir, path: path.to_owned() }))
    }

    /// The file of this key, as it is: enough to tell what it is of, not to run it.
    pub(super) fn peek(&self, key: &Key) -> rustix::io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        rustix::fs::openat(&self.dir, key.to_string(), flags, Mode::empty()).map(File::from)
    }

    /// The code for this key, checked to be exactly what was stored. What is damaged is removed.
    pub(super) fn find(&self, key: &Key) -> Option<File> {
        let file = match self.peek(key) {
            Ok(file) => file,
            Err(Errno::NOENT) => return None,
            Err(error) => {
                self.discard(key, &error.to_string());
                return None;
            }
        };
        match verify(&file, key) {
            Ok(()) => Some(file),
            Err(error) => {
                self.discard(key, &error.to_string());
                None
            }
        }
    }

    /// Remembers that the entry is used, now: the longest unused are evicted first.
    pub(super) fn touch(&self, key: &Key) {
        tidy::touch(&self.dir, &key.to_string());
    }

    /// The turn for `what`, if no other process has it.
    pub(super) fn turn(&self, what: &str) -> io::Result<Option<Turn>> {
        Turn::take(&self.dir, what)
    }

    /// Stores the code and returns the stored file; evicts others if the folder holds more than `limit` bytes then.
    /// `code` must not change meanwhile: it is sealed.
    pub(super) fn store(&self, key: &Key, code: &File, limit: u64) -> io::Result<File> {
        let bytes = code.metadata()?.len().saturating_add(TRAILER);
        if bytes > limit {
            let why = format!("its {bytes} bytes are more than the {limit} that `cache_max_size` allows for all");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
        }
        let name = key.to_string();
        let stored = self.write(key, &name, code)?;
        if let Err(error) = tidy::tidy(&self.dir, limit, &name) {
            warn!(folder = %self.path.display(), %error, "the cache folder cannot be tidied");
        }
        Ok(stored)
    }

    fn write(&self, key: &Key, name: &str, code: &File) -> io::Result<File> {
        match rustix::fs::openat(
            &self.dir,
            ".",
            OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
            Mode::RUSR | Mode::WUSR,
        ) {
            Ok(fd) => {
                let file = File::from(fd);
                copy(code, &file, key)?;
                let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
                match rustix::fs::linkat(rustix::fs::CWD, unnamed, &self.dir, name, AtFlags::SYMLINK_FOLLOW) {
                    // Another daemon was quicker; ours is the same and goes away with its last descriptor.
                    Ok(()) | Err(Errno::EXIST) => Ok(file),
                    Err(error) => Err(error.into()),
                }
            }
            // Not every file system has unnamed files (NFS, overlayfs before Linux 6.1).
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => self.write_named(key, name, code),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes an entry that cannot be used; the next load compiles it anew.
    pub(super) fn discard(&self, key: &Key, why: &str) {
        warn!(folder = %self.path.display(), %key, why, "a cache entry is damaged; it is removed and compiled again");
        if let Err(error) = rustix::fs::unlinkat(&self.dir, key.to_string(), AtFlags::empty())
            && error != Errno::NOENT
        {
            warn!(%key, %error, "the damaged cache entry cannot be removed");
        }
    }

    fn write_named(&self, key: &Key, name: &str, code: &File) -> io::Result<File> {
        let (temporary, file) = self.temporary()?;
        let stored =
            copy(code, &file, key).and_then(|()| Ok(rustix::fs::renameat(&self.dir, &*temporary, &self.dir, name)?));
        if stored.is_err() {
            // Best effort: whatever is left is swept after the next store.
            let _ = rustix::fs::unlinkat(&self.dir, &*temporary, AtFlags::empty());
        }
        stored.map(|()| file)
    }

    /// A new file, locked for as long as it is open: that it is locked tells the others that its writer lives.
    fn temporary(&self) -> io::Result<(String, File)> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        loop {
            let name = format!("{TEMPORARY}{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
            let file = match rustix::fs::openat(&self.dir, &*name, flags, Mode::RUSR | Mode::WUSR) {
                Ok(fd) => File::from(fd),
                // Of a dead process that had our number.
                Err(Errno::EXIST) => continue,
                Err(error) => return Err(error.into()),
            };
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if turn::is_named(&self.dir, &name, &file)? => return Ok((name, file)),
                // Somebody who sweeps took it for a dead one's before it was locked.
                Ok(()) | Err(Errno::WOULDBLOCK) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Err(Errno::NOENT) => {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
            Ok(rustix::fs::open(path, flags, Mode::empty())?)
        }
        opened => Ok(opened?),
    }
}

fn check_owner(dir: impl AsFd, path: &Path) -> Result<(), LoadError> {
    let stat = rustix::fs::fstat(dir).map_err(|error| {
        LoadError::internal(format!("the cache folder {} cannot be looked at: {error}", path.display()))
    })?;
    let us = rustix::process::geteuid().as_raw();
    let mode = stat.st_mode & 0o7777;
    if stat.st_uid == us && mode & 0o077 == 0 {
        return Ok(());
    }
    let path = path.display();
    Err(LoadError::unsafe_cache(format!(
        "the cache folder {path} belongs to uid {} with mode {mode:04o}; code is run from it, so it must belong to uid {us} \
         and be closed to everyone else: empty it, then `chown {us} {path} && chmod 0700 {path}`, or set the runtime option \
         `cache_dir`",
        stat.st_uid
    )))
}

/// Copies the code and appends the trailer, in one pass over the data.
fn copy(code: &File, mut to: &File, key: &Key) -> io::Result<()> {
    let (length, digest) = digest(code, code.metadata()?.len(), key, |chunk| to.write_all(chunk))?;
    to.write_all(&MAGIC)?;
    to.write_all(&length.to_le_bytes())?;
    to.write_all(&digest)
}

fn verify(file: &File, key: &Key) -> io::Result<()> {
    let damaged = |why| io::Error::new(io::ErrorKind::InvalidData, why);
    let metadata = file.metadata()?;
    let length =
        metadata.len().checked_sub(TRAILER).filter(|_| metadata.is_file()).ok_or_else(|| damaged("too short"))?;
    let mut trailer = [0; TRAILER as usize];
    file.read_exact_at(&mut trailer, length)?;
    let (head, stored) = trailer.split_at(16);
    if head != [MAGIC, length.to_le_bytes()].concat() {
        return Err(damaged("its length is not the one it was stored with"));
    }
    let (_, digest) = digest(file, length, key, |_| Ok(()))?;
    if stored != digest {
        return Err(damaged("its contents are not those it was stored with"));
    }
    Ok(())
}

/// Reads `length` bytes from the start, hands each piece to `each` and returns what was read and its digest.
fn digest(
    file: &File,
    length: u64,
    key: &Key,
    mut each: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<(u64, [u8; 32])> {
    struct At<'a>(&'a File, u64);
    impl Read for At<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let read = self.0.read_at(buffer, self.1)?;
            self.1 += read as u64;
            Ok(read)
        }
    }
    let mut hash = Sha256::new_with_prefix(key.0);
    let mut reader = At(file, 0).take(length);
    let mut buffer = vec![0; 128 << 10];
    let mut total = 0;
    loop {
        let read = match reader.read(&mut buffer) {
            Ok(0) => return Ok((total, hash.finalize().into())),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hash.update(&buffer[..read]);
        each(&buffer[..read])?;
        total += read as u64;
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
