//! Limits as a kubelet sets, changes and reads them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_cri::v1 as cri;

use super::limits::expect_rate;
use super::pods::expect_empty;
use crate::common::Outcome;
use crate::common::containerd::Containerd;
use crate::common::cri::{Kubelet, PodContainer};
use crate::common::machine::undisturbed;

pub const CASES: crate::common::Cases = &[("a_kubelet_changes_limits_and_reads_statistics", limits)];

const MIB: u64 = 1 << 20;

/// CPU time and the moment of it, in nanoseconds; memory in bytes.
fn stats(container: &PodContainer<'_>) -> Result<(u64, i64, u64)> {
    let stats = container.stats()?;
    let (cpu, memory) = (stats.cpu.context("no CPU statistics")?, stats.memory.context("no memory statistics")?);
    let used = cpu.usage_core_nano_seconds.context("no CPU time")?.value;
    Ok((used, cpu.timestamp, memory.working_set_bytes.context("no memory")?.value))
}

fn rate(container: &PodContainer<'_>) -> Result<f64> {
    let (before, begin, _) = stats(container)?;
    std::thread::sleep(Duration::from_secs(2));
    let (after, end, _) = stats(container)?;
    Ok((after - before) as f64 / (end - begin) as f64)
}

fn quota(cpu_quota: i64) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources { cpu_period: 100_000, cpu_quota, ..Default::default() }
}

fn limits(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let pod = kubelet.run(kubelet.pod("limited")?)?;
    let spin = pod.guest("spin", &["/kit.wasm", "spin"], |config| {
        config.linux.get_or_insert_default().resources = Some(quota(20_000));
    })?;
    spin.start()?;
    undisturbed(|| expect_rate(0.2, rate(&spin)?))?;
    spin.update(quota(30_000))?;
    undisturbed(|| expect_rate(0.3, rate(&spin)?))?;
    let eat = pod.guest("eat", &["/kit.wasm", "eat", &(32 * MIB).to_string()], |config| {
        let resources = cri::LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() };
        config.linux.get_or_insert_default().resources = Some(resources);
    })?;
    eat.start()?;
    eat.wait_log("full")?;
    let (_, _, memory) = stats(&eat)?;
    ensure!((32 * MIB..40 * MIB).contains(&memory), "{memory} bytes");
    let limit = |bytes| cri::LinuxContainerResources { memory_limit_in_bytes: bytes, ..Default::default() };
    eat.update(limit(128 << 20))?;
    let error = eat.update(limit(16 << 20)).err().map(|error| format!("{error:#}"));
    ensure!(error.as_ref().is_some_and(|error| error.contains("are less than the")), "{error:?}");
    spin.stop(Duration::ZERO)?;
    pod.remove()?;
    expect_empty(&kubelet)
}
