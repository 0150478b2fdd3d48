//! Waiting, measuring and using time. All waits are host calls (`poll_oneoff`), all reads the monotonic clock.
use std::hint::spin_loop;
use std::io::Write;
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use crate::streams::stdout;
use crate::{Failure, Outcome};

/// 0 sleeps for ever.
pub fn sleep(seconds: f64) -> Outcome {
    if seconds == 0.0 {
        for_ever();
    }
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) => thread::sleep(duration),
        Err(error) => return Err(Failure::Usage(format!("{seconds} seconds: {error}"))),
    }
    Ok(0)
}

/// In naps of an hour: a longer one may overflow a host's clock, and then it would not sleep at all.
pub fn for_ever() -> ! {
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

/// Every `ms` a line `tick K US`: its number from 1 on, and the microseconds since the line before (the first: since
/// the start). How far US lies above `ms` is what the neighbours of this guest cost it. Without `count`, for ever.
pub fn tick(ms: u64, count: Option<u64>) -> Outcome {
    let mut last = Instant::now();
    for number in 1..=count.unwrap_or(u64::MAX) {
        thread::sleep(Duration::from_millis(ms));
        let now = Instant::now();
        stdout().write_all(format!("tick {number} {}\n", (now - last).as_micros()).as_bytes())?;
        last = now;
    }
    Ok(0)
}

/// Asks for the time only now and then: this is to be CPU time of the guest, not of the host's clock call.
pub fn burn(ms: u64) -> Outcome {
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(ms) {
        (0..100_000_u32).for_each(|turn| {
            std::hint::black_box(turn);
            spin_loop();
        });
    }
    Ok(0)
}

pub fn exit_after(ms: u64, code: i32) -> ! {
    thread::sleep(Duration::from_millis(ms));
    process::exit(code)
}
