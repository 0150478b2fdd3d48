//! What a guest may do to its host: take memory, take the CPU, take the stack, end in a trap.
use std::hint::black_box;
use std::io::{self, Write};

use crate::streams::stdout;
use crate::{Outcome, time};

const STEP: usize = 1024 * 1024;
const PAGE: usize = 4096;

/// The exit code of [`eat_politely`] when the host refuses memory.
const REFUSED: u8 = 77;

/// Takes and touches memory in steps of 1 MiB up to `bytes`, a line `ate N` after each, then `full` and sleeps for ever.
/// Refused memory ends it as it ends most programs: a message of the allocator and a trap.
pub fn eat(bytes: usize) -> Outcome {
    swallow(bytes, |size| Some(Vec::with_capacity(size)))
}

/// Looks whether there was memory and ends with its own exit code where there was not.
pub fn eat_politely(bytes: usize) -> Outcome {
    swallow(bytes, |size| {
        let mut step = Vec::new();
        step.try_reserve_exact(size).ok().map(|()| step)
    })
}

fn swallow(bytes: usize, take: impl Fn(usize) -> Option<Vec<u8>>) -> Outcome {
    let mut eaten = Vec::new();
    let mut total = 0;
    while total < bytes {
        let size = STEP.min(bytes - total);
        let Some(mut step) = take(size) else {
            writeln!(io::stderr(), "kit: refused after {total} bytes")?;
            return Ok(REFUSED);
        };
        step.resize(size, 0);
        step.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
        total += size;
        eaten.push(black_box(step));
        stdout().write_all(format!("ate {total}\n").as_bytes())?;
    }
    stdout().write_all(b"full\n")?;
    time::for_ever()
}

/// The empty loop that no host call interrupts.
pub fn spin() -> ! {
    #[expect(clippy::empty_loop, reason = "the point of it: nothing here gives the host a chance")]
    loop {}
}

pub fn recurse() -> Outcome {
    Ok(deeper(1) as u8)
}

/// Keeps next to nothing in linear memory, so it is the host's stack that ends first, and not the guest's own.
#[inline(never)]
#[expect(unconditional_recursion, reason = "the point of it")]
fn deeper(depth: u64) -> u64 {
    black_box(deeper(black_box(depth) + 1)) + 1
}

#[cfg(target_family = "wasm")]
pub fn trap() -> ! {
    core::arch::wasm32::unreachable()
}

/// So that an editor, which looks at this for its own machine, finds no mistake.
#[cfg(not(target_family = "wasm"))]
pub fn trap() -> ! {
    std::process::abort()
}
