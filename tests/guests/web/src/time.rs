//! Waiting (a pollable of the monotonic clock) and burning, before the head and after it.
use std::hint::spin_loop;
use std::time::{Duration, Instant};

use wasip2::clocks::monotonic_clock::subscribe_duration;
use wasip2::http::types::ResponseOutparam;

use crate::answer::{Outcome, begin, text};
use crate::query::{Query, or_mistake};

pub fn sleep(query: &Query, out: ResponseOutparam) -> Outcome {
    let (ms, out) = or_mistake(query.number("ms", None), out)?;
    wait(ms);
    text(out, 200, "slept\n")
}

pub fn sleep_after_head(query: &Query, out: ResponseOutparam) -> Outcome {
    let (ms, out) = or_mistake(query.number("ms", None), out)?;
    between(out, || wait(ms))
}

/// Without `ms` it never ends.
pub fn spin(query: &Query, out: ResponseOutparam) -> Outcome {
    let (ms, out) = or_mistake(query.number("ms", Some(u64::MAX)), out)?;
    burn(ms);
    text(out, 200, "spun\n")
}

pub fn spin_after_head(query: &Query, out: ResponseOutparam) -> Outcome {
    let (ms, out) = or_mistake(query.number("ms", Some(u64::MAX)), out)?;
    between(out, || burn(ms))
}

/// The client has everything when this guest goes on.
pub fn after(query: &Query, out: ResponseOutparam) -> Outcome {
    let (ms, out) = or_mistake(query.number("ms", Some(0)), out)?;
    text(out, 200, "done\n")?;
    wait(ms);
    println!("after done");
    Ok(())
}

fn between(out: ResponseOutparam, work: impl FnOnce()) -> Outcome {
    let mut body = begin(out, 200, &[("content-type", "text/plain")]);
    body.put(b"first\n")?;
    body.flush()?;
    work();
    body.put(b"second\n")?;
    body.finish(None);
    Ok(())
}

pub fn wait(ms: u64) {
    subscribe_duration(ms.saturating_mul(1_000_000)).block();
}

/// Asks for the time only now and then: this is to be CPU time of the guest, not of the host's clock call.
fn burn(ms: u64) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(ms) {
        (0..100_000_u32).for_each(|turn| {
            std::hint::black_box(turn);
            spin_loop();
        });
    }
}
