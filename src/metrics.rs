//! What a container uses, in the message of the host's cgroup version: the only two that containerd's clients read.

use std::path::Path;

use containerd_shim::util::convert_to_any;
use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use troupe_actors::{Measured, Usage};

use crate::native_metrics;

/// The host's version: CRI and kubelet expect the one they would find in its cgroups.
pub fn host_has_cgroup_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// What was measured as `io.containerd.cgroups.v1.Metrics` or `v2.Metrics`.
///
/// # Errors
/// When the message cannot be encoded.
pub fn encode(measured: &Measured, cgroup_v2: bool) -> containerd_shim::Result<Any> {
    let usage = match measured {
        Measured::Guest(usage) => usage,
        Measured::Native(stats) => return native_metrics::encode(stats),
    };
    if cgroup_v2 { convert_to_any(Box::new(to_v2(usage))) } else { convert_to_any(Box::new(to_v1(usage))) }
}

fn to_v1(usage: &Usage) -> v1::Metrics {
    let nanos = u64::try_from(usage.cpu.as_nanos()).unwrap_or(u64::MAX);
    let cpu = v1::CPUUsage { total: nanos, user: nanos, ..Default::default() };
    let throttling = v1::Throttle {
        periods: usage.throttled.periods,
        throttled_periods: usage.throttled.throttled,
        throttled_time: u64::try_from(usage.throttled.time.as_nanos()).unwrap_or(u64::MAX),
        ..Default::default()
    };
    let cpu = v1::CPUStat {
        usage: MessageField::some(cpu),
        throttling: MessageField::some(throttling),
        ..Default::default()
    };
    let memory = v1::MemoryEntry {
        usage: usage.memory,
        max: usage.memory_peak,
        limit: usage.memory_limit.unwrap_or(u64::MAX),
        failcnt: usage.out_of_memory.into(),
        ..Default::default()
    };
    let stat = v1::MemoryStat {
        rss: usage.memory,
        total_rss: usage.memory,
        active_anon: usage.memory,
        hierarchical_memory_limit: usage.memory_limit.unwrap_or(u64::MAX),
        usage: MessageField::some(memory),
        ..Default::default()
    };
    v1::Metrics { cpu: MessageField::some(cpu), memory: MessageField::some(stat), ..Default::default() }
}

fn to_v2(usage: &Usage) -> v2::Metrics {
    let micros = u64::try_from(usage.cpu.as_micros()).unwrap_or(u64::MAX);
    let killed = usage.out_of_memory.into();
    let cpu = v2::CPUStat {
        usage_usec: micros,
        user_usec: micros,
        nr_periods: usage.throttled.periods,
        nr_throttled: usage.throttled.throttled,
        throttled_usec: u64::try_from(usage.throttled.time.as_micros()).unwrap_or(u64::MAX),
        ..Default::default()
    };
    v2::Metrics {
        cpu: MessageField::some(cpu),
        memory: MessageField::some(v2::MemoryStat {
            anon: usage.memory,
            active_anon: usage.memory,
            usage: usage.memory,
            max_usage: usage.memory_peak,
            usage_limit: usage.memory_limit.unwrap_or(u64::MAX),
            ..Default::default()
        }),
        memory_events: MessageField::some(v2::MemoryEvents { oom: killed, oom_kill: killed, ..Default::default() }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use troupe_actors::guest::Throttled;

    use super::*;

    #[test]
    fn both_messages_carry_the_names_containerd_knows() {
        let usage = Usage {
            cpu: Duration::from_micros(1500),
            memory: 4096,
            memory_peak: 8192,
            memory_limit: Some(1 << 20),
            out_of_memory: true,
            throttled: Throttled { periods: 5, throttled: 3, time: Duration::from_micros(2500) },
        };
        let measured = Measured::Guest(usage);
        assert_eq!(encode(&measured, false).unwrap().type_url, "io.containerd.cgroups.v1.Metrics");
        assert_eq!(encode(&measured, true).unwrap().type_url, "io.containerd.cgroups.v2.Metrics");
        assert_eq!(to_v1(&usage).cpu.usage.total, 1_500_000);
        assert_eq!(to_v2(&usage).cpu.usage_usec, 1500);
        assert_eq!(to_v2(&usage).memory_events.oom_kill, 1);
        assert_eq!(to_v1(&usage).memory.usage.limit, 1 << 20);
        let (v1, v2) = (to_v1(&usage).cpu.throttling.clone(), to_v2(&usage).cpu.clone());
        assert_eq!((v1.periods, v1.throttled_periods, v1.throttled_time), (5, 3, 2_500_000));
        assert_eq!((v2.nr_periods, v2.nr_throttled, v2.throttled_usec), (5, 3, 2500));
    }
}
