//! Tar files that do not fill the memory.
//!
//! The crate `tar` reads what stands between two members (long names, pax headers, maps of sparse files) as a whole, as
//! long as a header says it is: a few compressed bytes can say gigabytes. So the reader below it ends when too much is
//! read between two members. Members themselves may be of any size: their readers decide.
//!
//! Called by `layers.rs` and `layout.rs`.

use std::cell::Cell;
use std::io::{self, Read, Seek, SeekFrom};
use std::rc::Rc;

use tar::Entry;

/// How much may stand between two members: names and links of 4 KiB, and what programs attach to files.
const MOST: u64 = 1 << 20;

/// What a tar file is read from.
#[derive(Debug)]
pub struct Bounded<R> {
    from: R,
    at: u64,
    end: Rc<Cell<u64>>,
}

/// Where the reader of a tar file ends.
#[derive(Debug)]
pub struct Bound(Rc<Cell<u64>>);

/// A reader for a tar file, and its bound, which has to be moved on with each member.
pub fn bounded<R>(from: R) -> (Bounded<R>, Bound) {
    let end = Rc::new(Cell::new(MOST));
    (Bounded { from, at: 0, end: Rc::clone(&end) }, Bound(end))
}

impl Bound {
    /// From here on, what `member` has in the file may be read, and what stands before the next one.
    ///
    /// # Errors
    /// When its header makes no sense.
    pub fn pass<R: Read>(&self, member: &Entry<'_, R>) -> io::Result<()> {
        // Of a sparse file, the size is that of what it stands for.
        let is_sparse = member.header().entry_type().is_gnu_sparse();
        let size = if is_sparse { member.header().entry_size()? } else { member.size() };
        self.0.set(member.raw_file_position().saturating_add(size).saturating_add(MOST));
        Ok(())
    }
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.end.get().saturating_sub(self.at)).unwrap_or(usize::MAX);
        if room == 0 && !buffer.is_empty() {
            let why = format!("more than {MOST} bytes of headers between two members of the tar file");
            return Err(io::Error::other(why));
        }
        let length = buffer.len().min(room);
        let read = self.from.read(&mut buffer[..length])?;
        self.at += read as u64;
        Ok(read)
    }
}

impl<R: Seek> Seek for Bounded<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.at = self.from.seek(to)?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tar::{Archive, Builder, EntryType, Header};

    use super::*;

    fn header(kind: EntryType, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_cksum();
        header
    }

    /// Counts what is read.
    struct Counted<R>(R, Rc<Cell<u64>>);

    impl<R: Read> Read for Counted<R> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let read = self.0.read(buffer)?;
            self.1.set(self.1.get() + read as u64);
            Ok(read)
        }
    }

    /// The names in it, and how much of it was read.
    fn names(tar: impl Read) -> (io::Result<Vec<PathBuf>>, u64) {
        let count = Rc::new(Cell::new(0));
        let (reader, bound) = bounded(Counted(tar, Rc::clone(&count)));
        let names = || {
            let mut names = Vec::new();
            for entry in Archive::new(reader).entries()? {
                let entry = entry?;
                bound.pass(&entry)?;
                names.push(entry.path()?.into_owned());
            }
            Ok(names)
        };
        (names(), count.get())
    }

    #[test]
    fn large_members_and_long_names_are_read() {
        let long = "n".repeat(5000);
        let content = vec![0; 3 << 20];
        let mut tar = Builder::new(Vec::new());
        for name in ["a", &long, "b"] {
            tar.append_data(&mut header(EntryType::Regular, content.len() as u64), name, &content[..]).unwrap();
        }
        tar.append_pax_extensions([("SCHILY.xattr.user.a", &content[..100_000])]).unwrap();
        tar.append_data(&mut header(EntryType::Regular, 0), "c", io::empty()).unwrap();
        let tar = tar.into_inner().unwrap();
        let (read, _) = names(&tar[..]);
        assert_eq!(read.unwrap(), ["a", &long, "b", "c"].map(PathBuf::from));
    }

    #[test]
    fn headers_without_end_are_refused_early() {
        let file = header(EntryType::Regular, 5);
        for kind in [EntryType::GNULongName, EntryType::GNULongLink, EntryType::XHeader] {
            let mut start = [file.as_bytes(), &b"hello"[..], &[0; 507]].concat();
            start.extend(header(kind, 1 << 33).as_bytes());
            let (read, count) = names(start.chain(io::repeat(b'x').take(1 << 33)));
            assert!(read.unwrap_err().to_string().contains("headers between two members"), "{kind:?}");
            assert!(count < 2 * MOST, "{kind:?}: {count} bytes");
        }
        // Many small ones, and a sparse file that stands for more than anybody has.
        let globals: Vec<u8> = header(EntryType::XGlobalHeader, 0).as_bytes().to_vec();
        let (read, count) = names(io::Cursor::new(globals.repeat(100)));
        assert!(read.is_ok() && count == 51_200, "{count}");
        let mut sparse = header(EntryType::GNUSparse, 0);
        let gnu = sparse.as_gnu_mut().unwrap();
        gnu.set_real_size(1 << 60);
        gnu.set_is_extended(true);
        sparse.set_cksum();
        let more = [&[0; 504][..], &[1], &[0; 7]].concat();
        let (read, count) = names(io::Cursor::new([sparse.as_bytes(), &more.repeat(10_000)[..]].concat()));
        assert!(read.is_err() && count < 2 * MOST, "{count}");
    }
}
