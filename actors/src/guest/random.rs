//! `random_get` of preview 1, in pieces.
//!
//! No epoch interrupts a host call. The stock one makes all the bytes in one go, some 10 ms for 4 MiB: time in which the
//! guest cannot be killed and others wait for its thread. Called by `program` only.

use wasmtime::{Caller, Extern, Result, bail};
use wasmtime_wasi::WasiView as _;
use wasmtime_wasi::p2::bindings::random::random::Host as _;

use super::store::Guest;

/// Between two yields: about half a millisecond.
const PIECE: u64 = 256 << 10;

/// `errno::success` and `errno::fault` of preview 1.
const SUCCESS: u32 = 0;
const FAULT: u32 = 21;

/// Fills `length` bytes of the guest's memory from `at` on; returns preview 1's errno.
pub async fn get(mut caller: Caller<'_, Guest>, at: u32, length: u32) -> Result<u32> {
    let Some(Extern::Memory(memory)) = caller.get_export("memory") else {
        bail!("it calls random_get and does not export its `memory`");
    };
    let (mut at, end) = (u64::from(at), u64::from(at) + u64::from(length));
    if end > memory.data_size(&caller) as u64 {
        return Ok(FAULT);
    }
    while at < end {
        let bytes = caller.data_mut().ctx().ctx.random().get_random_bytes(PIECE.min(end - at))?;
        memory.write(&mut caller, usize::try_from(at)?, &bytes)?;
        at += PIECE;
        if at < end {
            tokio::task::yield_now().await;
        }
    }
    Ok(SUCCESS)
}
