//! What a task uses, out of the message of either cgroup version.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use containerd_shim_protos::cgroups::metrics::Metrics as V1;
use containerd_shim_protos::cgroups_v2::metrics::Metrics as V2;
use containerd_shim_protos::protobuf::Message as _;

#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// When the answer was here.
    pub at: Instant,
    pub cpu: Duration,
    pub memory: u64,
    pub memory_peak: u64,
    pub memory_limit: u64,
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled: Duration,
}

impl Usage {
    pub fn decode(type_url: &str, value: &[u8]) -> Result<Self> {
        let at = Instant::now();
        match type_url {
            "io.containerd.cgroups.v1.Metrics" => {
                let metrics = V1::parse_from_bytes(value)?;
                let (cpu, memory) = (&metrics.cpu, &metrics.memory.usage);
                Ok(Self {
                    at,
                    cpu: Duration::from_nanos(cpu.usage.total),
                    memory: memory.usage,
                    memory_peak: memory.max,
                    memory_limit: memory.limit,
                    periods: cpu.throttling.periods,
                    throttled_periods: cpu.throttling.throttled_periods,
                    throttled: Duration::from_nanos(cpu.throttling.throttled_time),
                })
            }
            "io.containerd.cgroups.v2.Metrics" => {
                let metrics = V2::parse_from_bytes(value)?;
                let (cpu, memory) = (&metrics.cpu, &metrics.memory);
                Ok(Self {
                    at,
                    cpu: Duration::from_micros(cpu.usage_usec),
                    memory: memory.usage,
                    memory_peak: memory.max_usage,
                    memory_limit: memory.usage_limit,
                    periods: cpu.nr_periods,
                    throttled_periods: cpu.nr_throttled,
                    throttled: Duration::from_micros(cpu.throttled_usec),
                })
            }
            other => bail!("metrics of the type {other}"),
        }
    }

    /// How much of one core was used from an earlier moment to this one.
    pub fn cores_since(&self, earlier: &Self) -> f64 {
        (self.cpu - earlier.cpu).as_secs_f64() / (self.at - earlier.at).as_secs_f64()
    }
}
