//! How much of the machine a container may use: what `linux.resources` of its specification says, and what an update of
//! it changes.
//!
//! Pure. What has no counterpart here (shares, sets of CPUs, swap, devices, …) is left out, as the rest of the
//! specification is. A missing or zero field says nothing: no limit at creation, the old one in an update.

use std::time::Duration;

use oci_spec::runtime::LinuxResources;

use crate::error::{Error, Result};

/// The kernel's default period.
const PERIOD: Duration = Duration::from_millis(100);
/// What the kernel takes as a period.
const PERIODS: std::ops::RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(1);
const LEAST_TIME: Duration = Duration::from_millis(1);

/// The limits of a container; `None` is unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes.
    pub memory: Option<u64>,
    pub cpu: Option<Quota>,
}

/// So much CPU time in each period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    pub time: Duration,
    pub period: Duration,
}

impl Limits {
    /// The limits of a specification.
    ///
    /// # Errors
    /// As [`Limits::updated`].
    pub fn of(resources: Option<&LinuxResources>) -> Result<Self> {
        resources.map_or(Ok(Self::default()), |resources| Self::default().updated(resources))
    }

    /// These limits, changed as an update says.
    ///
    /// # Errors
    /// `Invalid`, for periods and quotas that the kernel would refuse as well.
    pub fn updated(self, resources: &LinuxResources) -> Result<Self> {
        let memory = match resources.memory().as_ref().and_then(|memory| memory.limit()) {
            None | Some(0) => self.memory,
            Some(limit) => u64::try_from(limit).ok(),
        };
        let cpu = resources.cpu().as_ref();
        let period = cpu.and_then(|cpu| cpu.period()).filter(|period| *period > 0).map(Duration::from_micros);
        let time = match cpu.and_then(|cpu| cpu.quota()) {
            None | Some(0) => self.cpu.map(|quota| quota.time),
            Some(quota) => u64::try_from(quota).ok().map(Duration::from_micros),
        };
        let before = self.cpu.map_or(PERIOD, |quota| quota.period);
        let cpu = time.map(|time| Quota { time, period: period.unwrap_or(before) }.checked()).transpose()?;
        Ok(Self { memory, cpu })
    }
}

impl Quota {
    fn checked(self) -> Result<Self> {
        let wrong = |field: &str, value: Duration, may: String| {
            Err(Error::invalid(format!("linux.resources.cpu.{field}: {} µs; it may be {may}", value.as_micros())))
        };
        if !PERIODS.contains(&self.period) {
            let may = format!("{} to {}", PERIODS.start().as_micros(), PERIODS.end().as_micros());
            return wrong("period", self.period, may);
        }
        if self.time < LEAST_TIME {
            return wrong("quota", self.time, format!("{} and more, or -1 for no limit", LEAST_TIME.as_micros()));
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(text: &str) -> LinuxResources {
        serde_json::from_str(text).unwrap()
    }

    fn quota(time: u64, period: u64) -> Option<Quota> {
        Some(Quota { time: Duration::from_millis(time), period: Duration::from_millis(period) })
    }

    #[test]
    fn limits_are_what_the_kernel_would_make_of_them() {
        for (text, memory, cpu) in [
            ("{}", None, None),
            (r#"{"cpu":{"quota":20000},"memory":{"limit":1048576}}"#, Some(1 << 20), quota(20, 100)),
            (r#"{"cpu":{"quota":20000,"period":50000},"memory":{"limit":-1}}"#, None, quota(20, 50)),
            (r#"{"cpu":{"quota":-1,"period":5},"memory":{"limit":0}}"#, None, None),
            (r#"{"cpu":{"quota":0,"period":100000,"shares":2}}"#, None, None),
            (r#"{"cpu":{"quota":9223372036854775807,"period":0}}"#, None, quota(9_223_372_036_854_775, 100)),
        ] {
            let limits = Limits::of(Some(&resources(text))).unwrap();
            assert_eq!(limits.memory, memory, "{text}");
            assert_eq!(
                limits.cpu.map(|cpu| (cpu.time.as_millis(), cpu.period)),
                cpu.map(|cpu| (cpu.time.as_millis(), cpu.period))
            );
        }
        assert_eq!(Limits::of(None).unwrap(), Limits::default());
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let before = Limits { memory: Some(5), cpu: quota(20, 50) };
        for (text, after) in [
            ("{}", before),
            (r#"{"cpu":{"shares":2},"memory":{}}"#, before),
            (r#"{"cpu":{"quota":30000}}"#, Limits { cpu: quota(30, 50), ..before }),
            (r#"{"cpu":{"period":200000}}"#, Limits { cpu: quota(20, 200), ..before }),
            (r#"{"cpu":{"quota":-1}}"#, Limits { cpu: None, ..before }),
            (r#"{"memory":{"limit":7}}"#, Limits { memory: Some(7), ..before }),
            (r#"{"memory":{"limit":-1}}"#, Limits { memory: None, ..before }),
        ] {
            assert_eq!(before.updated(&resources(text)).unwrap(), after, "{text}");
        }
    }

    #[test]
    fn what_the_kernel_refuses_is_named() {
        for (cpu, words) in [
            (r#"{"quota":999}"#, "linux.resources.cpu.quota: 999 µs; it may be 1000 and more"),
            (r#"{"quota":20000,"period":999}"#, "linux.resources.cpu.period: 999 µs; it may be 1000 to 1000000"),
            (r#"{"quota":20000,"period":1000001}"#, "linux.resources.cpu.period"),
            (r#"{"quota":20000,"period":18446744073709551615}"#, "linux.resources.cpu.period"),
        ] {
            let error = Limits::of(Some(&resources(&format!(r#"{{"cpu":{cpu}}}"#)))).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
