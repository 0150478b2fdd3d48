//! What goes in and out. Everything here writes to the descriptors themselves: std's stdout would gather lines.
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;

use crate::{Failure, Outcome};

const CHUNK: usize = 64 * 1024;
const LINE: usize = 16;

/// A descriptor of ours as a file that does not close it.
fn descriptor(number: i32) -> ManuallyDrop<File> {
    // SAFETY: 0, 1 and 2 are open for the whole life of the guest, and `ManuallyDrop` leaves them so.
    ManuallyDrop::new(unsafe { File::from_raw_fd(number) })
}

pub fn stdout() -> ManuallyDrop<File> {
    descriptor(1)
}

pub fn lines(lines: impl IntoIterator<Item = OsString>) -> Outcome {
    for line in lines {
        put(&mut stdout(), &line)?;
    }
    Ok(0)
}

pub fn complain(text: &OsStr) -> Outcome {
    put(&mut descriptor(2), text)?;
    Ok(0)
}

fn put(to: &mut File, line: &OsStr) -> io::Result<()> {
    to.write_all(&[line.as_encoded_bytes(), b"\n"].concat())
}

/// `out 1`, `err 1`, `out 2`, … each to where its name says.
pub fn both(count: u64) -> Outcome {
    for line in 1..=count {
        writeln!(stdout(), "out {line}")?;
        writeln!(descriptor(2), "err {line}")?;
    }
    Ok(0)
}

/// Hands on what it gets when it gets it.
pub fn copy(mut from: impl Read) -> Outcome {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(0),
            Ok(count) => stdout().write_all(&buffer[..count])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Exactly `total` bytes in which any piece lost, doubled or moved shows: the line that begins at offset `o`, always a
/// multiple of 16, is `o` as 15 hexadecimal digits and a newline. The last line is cut where `total` says so.
pub fn write(total: u64) -> Outcome {
    let mut chunk: Vec<u8> =
        (0..CHUNK / LINE).flat_map(|line| format!("{:015x}\n", line * LINE).into_bytes()).collect();
    let mut written: u64 = 0;
    while written < total {
        // Within a chunk only the low four digits differ, and they are the same in every chunk.
        let high = format!("{:011x}", written / CHUNK as u64);
        for line in chunk.chunks_exact_mut(LINE) {
            line[..high.len()].copy_from_slice(high.as_bytes());
        }
        let length = (total - written).min(CHUNK as u64);
        stdout().write_all(&chunk[..length as usize])?;
        written += length;
    }
    Ok(0)
}

/// `count` bytes of the host's generator in hexadecimal.
pub fn random(count: usize) -> Outcome {
    #[link(wasm_import_module = "wasi_snapshot_preview1")]
    unsafe extern "C" {
        fn random_get(buffer: *mut u8, length: usize) -> u16;
    }
    let mut bytes = vec![0; count];
    // SAFETY: the host writes `length` bytes at most, and the vector has them.
    match unsafe { random_get(bytes.as_mut_ptr(), bytes.len()) } {
        0 => lines([bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into()]),
        code => Err(Failure::Host(io::Error::from_raw_os_error(code.into()))),
    }
}
