//! The machine's mood: on a shared one, the hypervisor may give its cores to others for a while.

use std::time::Duration;

use anyhow::Result;

use super::proc;

/// A stretch of time, from its beginning on.
pub struct Stretch {
    stolen: Duration,
}

impl Stretch {
    pub fn begin() -> Result<Self> {
        Ok(Self { stolen: proc::stolen()? })
    }

    /// For how long in it a core was not there although somebody wanted it; the sum over the cores, in steps of 10 ms.
    pub fn stolen(&self) -> Result<Duration> {
        Ok(proc::stolen()?.saturating_sub(self.stolen))
    }
}

/// So often a figure is taken at most.
const TIMES: usize = 8;

/// For rates and sums of CPU time, which mean nothing while the cores are elsewhere: takes them again, and shows what was
/// wrong, as long as time was stolen meanwhile. What is wrong on cores that were there fails at once.
pub fn undisturbed<T>(mut take: impl FnMut() -> Result<T>) -> Result<T> {
    // From the first time on: a guest that was charged for stolen time owes it for a while.
    let stretch = Stretch::begin()?;
    for time in 1..TIMES {
        let error = match take() {
            Ok(figure) => return Ok(figure),
            Err(error) => error,
        };
        let stolen = stretch.stolen()?;
        if stolen.is_zero() {
            return Err(error);
        }
        eprintln!("taken {time} times, of {TIMES} at most; {stolen:?} were stolen: {error:#}");
    }
    take()
}
