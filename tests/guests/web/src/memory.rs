//! Memory: how much there is, and what is left in it of a request before.
//!
//! `/search` must not find itself: it turns every bit of the needle in the very buffer that the host wrote it to, before
//! anything is copied, and compares with memory turned as it reads. So what it finds was left there before.
use std::hint::black_box;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use wasip2::http::types::{IncomingRequest, ResponseOutparam};

use crate::answer::{Outcome, text};
use crate::bodies::read;
use crate::query::{Query, or_mistake};
use crate::time::wait;

const PAGE: usize = 4096;
const STEP: usize = 1024 * 1024;
const HEAP: usize = 4 * STEP;
const STATIC: usize = 64 * 1024;
/// Of the stack, one call of [`recurse`]; all of them together stay well below the stack's 1 MiB.
const FRAME: usize = 8 * 1024;
const FRAMES: usize = 32;
const TURN: u8 = 0xff;

static ASKED: AtomicU32 = AtomicU32::new(0);
static mut REMEMBERED: [u8; STATIC] = [0; STATIC];

pub fn static_counter(out: ResponseOutparam) -> Outcome {
    let asked = ASKED.fetch_add(1, Ordering::Relaxed) + 1;
    text(out, 200, &format!("{asked}\n"))
}

/// 507 where the host refuses.
pub fn alloc(query: &Query, out: ResponseOutparam) -> Outcome {
    let (bytes, out) = or_mistake(query.number::<usize>("bytes", None), out)?;
    match take(bytes) {
        Some(taken) => text(out, 200, &format!("{}\n", taken.len())),
        None => text(out, 507, "refused\n"),
    }
}

/// `refused after N` as soon as the host says no; where it never does, 4 GiB are the end.
pub fn alloc_forever(out: ResponseOutparam) -> Outcome {
    let mut taken = Vec::new();
    while let Some(step) = take(STEP) {
        taken.push(step);
    }
    let total = taken.len() * STEP;
    drop(taken);
    text(out, 200, &format!("refused after {total}\n"))
}

fn take(bytes: usize) -> Option<Vec<u8>> {
    let mut taken = Vec::new();
    taken.try_reserve_exact(bytes).ok()?;
    taken.resize(bytes, 0);
    taken.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
    Some(black_box(taken))
}

/// With `ms`, it holds on to it for so long, and says on stdout when it begins to.
pub fn remember(query: &Query, request: &IncomingRequest, out: ResponseOutparam) -> Outcome {
    let (ms, out) = or_mistake(query.number("ms", Some(0)), out)?;
    let mut secret = Vec::new();
    read(request, |piece| {
        secret.extend_from_slice(piece);
        Ok(())
    })?;
    if secret.is_empty() {
        return text(out, 400, "the body is what to remember\n");
    }
    // SAFETY: a guest has one thread, and nothing else refers to this.
    repeat(&secret, unsafe { &mut *ptr::addr_of_mut!(REMEMBERED) });
    let mut heap = vec![0; HEAP];
    repeat(&secret, &mut heap);
    black_box(heap.leak());
    recurse(&secret, FRAMES);
    if ms > 0 {
        println!("remembered");
        wait(ms);
    }
    text(out, 200, "ok\n")
}

fn repeat(secret: &[u8], into: &mut [u8]) {
    into.chunks_mut(secret.len()).for_each(|chunk| chunk.copy_from_slice(&secret[..chunk.len()]));
    black_box(into);
}

#[inline(never)]
fn recurse(secret: &[u8], frames: usize) {
    let mut frame = [0; FRAME];
    repeat(secret, &mut frame);
    if frames > 1 {
        recurse(secret, frames - 1);
    }
    black_box(&frame);
}

/// `found COUNT`: at how many addresses of the whole memory the needle begins.
pub fn search(request: &IncomingRequest, out: ResponseOutparam) -> Outcome {
    let mut turned = Vec::new();
    read(request, |piece| {
        piece.iter_mut().for_each(|byte| *byte ^= TURN);
        // Nobody reads the piece again, which is a reason for the compiler to leave it as it was.
        turned.extend_from_slice(black_box(piece));
        Ok(())
    })?;
    if turned.is_empty() {
        return text(out, 400, "the body is what to look for\n");
    }
    let last = size().saturating_sub(turned.len());
    let found = (0..=last).filter(|start| begins_at(*start, &turned)).count();
    text(out, 200, &format!("found {found}\n"))
}

fn begins_at(start: usize, turned: &[u8]) -> bool {
    turned.iter().enumerate().all(|(offset, byte)| peek(start + offset) ^ TURN == *byte)
}

/// The byte at that address, whatever it is for. Volatile, because no object of this program has to be there.
fn peek(address: usize) -> u8 {
    let here: *const u8 = ptr::with_exposed_provenance(address);
    // SAFETY: the caller keeps below `size()`, and a module may read all of its memory. Address 0 is memory like any
    // other: a null check that debug builds have would refuse it, a release build has none.
    unsafe { ptr::read_volatile(here) }
}

#[cfg(target_family = "wasm")]
fn size() -> usize {
    core::arch::wasm32::memory_size(0) * 64 * 1024
}

/// So that an editor, which looks at this for its own machine, finds no mistake.
#[cfg(not(target_family = "wasm"))]
fn size() -> usize {
    0
}
