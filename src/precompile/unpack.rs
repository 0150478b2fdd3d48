//! What a layer holds, whatever it is compressed with: told by its first bytes, as tools disagree about media types.
//!
//! Called by `layers.rs` and `docker.rs`. Invariant: unpacking needs a bounded amount of memory, whatever the layer says.

use std::io::{self, BufRead, BufReader, Read};

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// The magic of a frame without data, but for its last four bits; some tools begin with one.
const SKIPPABLE: &[u8] = &[0x2a, 0x4d, 0x18];

/// How far back zstd may refer, and so how much is kept: as much as `zstd --long` does.
const MAX_WINDOW: u64 = 128 << 20;

/// A reader of what is packed; of what is not, as it is.
///
/// # Errors
/// When the beginning cannot be read.
pub fn unpacked<'a>(packed: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut packed = BufReader::with_capacity(64 << 10, packed);
    let mut head = [0; 4];
    let length = fill(&mut packed, &mut head)?;
    let is_skippable = head[0] & 0xf0 == 0x50 && &head[1..] == SKIPPABLE;
    let whole = io::Cursor::new(head).take(length as u64).chain(packed);
    if head.starts_with(GZIP) {
        Ok(Box::new(flate2::bufread::MultiGzDecoder::new(whole)))
    } else if head == ZSTD || is_skippable {
        Ok(Box::new(Frames::new(whole)))
    } else {
        Ok(Box::new(whole))
    }
}

/// Reads as much as there is and fits.
pub fn fill(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match from.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

/// The frames of a zstd file, one after another; the decoder knows one only.
struct Frames<R> {
    packed: R,
    decoder: FrameDecoder,
    is_inside: bool,
}

impl<R: BufRead> Frames<R> {
    fn new(packed: R) -> Self {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(MAX_WINDOW);
        Self { packed, decoder, is_inside: false }
    }

    /// Goes on to the next frame with data; false at the end.
    fn next(&mut self) -> io::Result<bool> {
        while !self.packed.fill_buf()?.is_empty() {
            match self.decoder.init(&mut self.packed) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    io::copy(&mut (&mut self.packed).take(length.into()), &mut io::sink())?;
                }
                Err(error) => return Err(broken(error)),
            }
        }
        Ok(false)
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.is_inside && !self.next()? {
                return Ok(0);
            }
            self.is_inside = true;
            while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                self.decoder.decode_blocks(&mut self.packed, BlockDecodingStrategy::UptoBlocks(1)).map_err(broken)?;
            }
            let read = self.decoder.read(buffer)?;
            if read > 0 {
                return Ok(read);
            }
            self.is_inside = false;
        }
    }
}

fn broken(error: FrameDecoderError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("zstd: {error}"))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    fn unpack(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        unpacked(packed)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        compress_to_vec(bytes, CompressionLevel::Fastest)
    }

    fn skippable(bytes: &[u8]) -> Vec<u8> {
        [&[0x53][..], SKIPPABLE, &u32::try_from(bytes.len()).unwrap().to_le_bytes(), bytes].concat()
    }

    /// "hello hello hello hello\n", by the `zstd` of Debian, with its checksum.
    const BY_ZSTD: &[u8] = &[
        0x28, 0xb5, 0x2f, 0xfd, 0x04, 0x58, 0x6d, 0x00, 0x00, 0x38, 0x68, 0x65, 0x6c, 0x6c, 0x6f, 0x20, 0x0a, 0x01,
        0x00, 0x99, 0x4b, 0x11, 0xa8, 0x7c, 0x2e, 0xa8,
    ];

    #[test]
    fn everything_is_told_by_its_beginning() {
        let large: Vec<u8> = (0..3_000_000_u32).flat_map(|number| (number / 7).to_le_bytes()).collect();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&large).unwrap();
        assert_eq!(unpack(&gzip.finish().unwrap()).unwrap(), large);
        assert_eq!(unpack(&zstd(&large)).unwrap(), large);
        for plain in [&large[..], b"", b"a", b"abcd", &[0x28, 0xb5, 0x2f]] {
            assert_eq!(unpack(plain).unwrap(), plain);
        }
    }

    #[test]
    fn frames_follow_one_another() {
        let frames = [skippable(b"index"), zstd(b"one "), zstd(b""), skippable(&[0; 100_000]), zstd(b"two")].concat();
        assert_eq!(unpack(&frames).unwrap(), b"one two");
        assert_eq!(unpack(&skippable(b"")).unwrap(), b"");
        assert!(unpack(&[zstd(b"one"), b"nonsense".to_vec()].concat()).is_err());
        assert_eq!(unpack(&[BY_ZSTD, &skippable(b"end")].concat()).unwrap(), b"hello hello hello hello\n");
        assert!(unpack(&BY_ZSTD[..BY_ZSTD.len() - 1]).is_err());
    }

    #[test]
    fn a_window_of_gigabytes_is_refused() {
        // Not of a single segment; the window's exponent is 10 + 21.
        let error = unpack(&[ZSTD, &[0, 21 << 3], &[1, 0, 0]].concat()).unwrap_err().to_string();
        assert!(error.contains("window"), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..500), at in any::<prop::sample::Index>(), value: u8) {
            let _ = unpack(&[ZSTD, &bytes].concat());
            let mut frame = zstd(&bytes);
            prop_assert_eq!(unpack(&frame).unwrap(), bytes);
            let at = at.index(frame.len());
            frame[at] = value;
            let _ = unpack(&frame);
        }
    }
}
