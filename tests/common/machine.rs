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
