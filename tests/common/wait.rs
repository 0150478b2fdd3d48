//! Deadlines. Where nothing tells of an event, its effect is looked for every few milliseconds.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Short beside anything a case measures, long enough to cost nothing.
const INTERVAL: Duration = Duration::from_millis(5);

/// Looks until `look` finds something.
pub fn until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("waited {limit:?} for {what}: it did not come");
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Looks until `holds` is true.
pub fn until_true(what: &str, limit: Duration, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, limit, || Ok(holds()?.then_some(())))
}
