//! What the cgroup of a native container says, in containerd's messages: the same fields that runc's shim fills.

use containerd_shim::util::convert_to_any;
use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use troupe_actors::{DeviceLine, NativeStats};

/// The message of the host's cgroup version.
///
/// # Errors
/// When the message cannot be encoded.
pub fn encode(stats: &NativeStats) -> containerd_shim::Result<Any> {
    if stats.unified { convert_to_any(Box::new(to_v2(stats))) } else { convert_to_any(Box::new(to_v1(stats))) }
}

/// The kernel counts user and system time of version 1 in these, a second has a hundred.
const NANOS_PER_TICK: u64 = 10_000_000;

fn to_v1(stats: &NativeStats) -> v1::Metrics {
    v1::Metrics {
        pids: MessageField::some(v1::PidsStat {
            current: stats.get("pids.current", ""),
            limit: limit(stats, "pids.max"),
            ..Default::default()
        }),
        cpu: MessageField::some(cpu_v1(stats)),
        memory: MessageField::some(memory_v1(stats)),
        blkio: MessageField::some(v1::BlkIOStat {
            io_service_bytes_recursive: entries(stats.devices("blkio.throttle.io_service_bytes_recursive")),
            io_serviced_recursive: entries(stats.devices("blkio.throttle.io_serviced_recursive")),
            ..Default::default()
        }),
        memory_oom_control: MessageField::some(v1::MemoryOomControl {
            oom_kill_disable: stats.get("memory.oom_control", "oom_kill_disable"),
            under_oom: stats.get("memory.oom_control", "under_oom"),
            oom_kill: stats.get("memory.oom_control", "oom_kill"),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn cpu_v1(stats: &NativeStats) -> v1::CPUStat {
    let ticks = |name| stats.get("cpuacct.stat", name) * NANOS_PER_TICK;
    let usage = v1::CPUUsage {
        total: stats.get("cpuacct.usage", ""),
        kernel: ticks("system"),
        user: ticks("user"),
        per_cpu: stats.list("cpuacct.usage_percpu"),
        ..Default::default()
    };
    let throttling = v1::Throttle {
        periods: stats.get("cpu.stat", "nr_periods"),
        throttled_periods: stats.get("cpu.stat", "nr_throttled"),
        throttled_time: stats.get("cpu.stat", "throttled_time"),
        ..Default::default()
    };
    v1::CPUStat { usage: MessageField::some(usage), throttling: MessageField::some(throttling), ..Default::default() }
}

fn memory_v1(stats: &NativeStats) -> v1::MemoryStat {
    let of = |name| stats.get("memory.stat", name);
    v1::MemoryStat {
        cache: of("cache"),
        rss: of("rss"),
        rss_huge: of("rss_huge"),
        mapped_file: of("mapped_file"),
        dirty: of("dirty"),
        writeback: of("writeback"),
        pg_pg_in: of("pgpgin"),
        pg_pg_out: of("pgpgout"),
        pg_fault: of("pgfault"),
        pg_maj_fault: of("pgmajfault"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        hierarchical_memory_limit: of("hierarchical_memory_limit"),
        hierarchical_swap_limit: of("hierarchical_memsw_limit"),
        total_cache: of("total_cache"),
        total_rss: of("total_rss"),
        total_rss_huge: of("total_rss_huge"),
        total_mapped_file: of("total_mapped_file"),
        total_dirty: of("total_dirty"),
        total_writeback: of("total_writeback"),
        total_pg_pg_in: of("total_pgpgin"),
        total_pg_pg_out: of("total_pgpgout"),
        total_pg_fault: of("total_pgfault"),
        total_pg_maj_fault: of("total_pgmajfault"),
        total_inactive_anon: of("total_inactive_anon"),
        total_active_anon: of("total_active_anon"),
        total_inactive_file: of("total_inactive_file"),
        total_active_file: of("total_active_file"),
        total_unevictable: of("total_unevictable"),
        usage: entry(stats, "memory."),
        swap: entry(stats, "memory.memsw."),
        kernel: entry(stats, "memory.kmem."),
        ..Default::default()
    }
}

fn entry(stats: &NativeStats, prefix: &str) -> MessageField<v1::MemoryEntry> {
    let of = |name: &str| stats.get(&format!("{prefix}{name}"), "");
    if !stats.has(&format!("{prefix}usage_in_bytes")) {
        return MessageField::none();
    }
    MessageField::some(v1::MemoryEntry {
        usage: of("usage_in_bytes"),
        max: of("max_usage_in_bytes"),
        limit: of("limit_in_bytes"),
        failcnt: of("failcnt"),
        ..Default::default()
    })
}

fn entries(lines: &[DeviceLine]) -> Vec<v1::BlkIOEntry> {
    let entry = |line: &DeviceLine| v1::BlkIOEntry {
        op: line.name.clone(),
        major: line.major,
        minor: line.minor,
        value: line.value,
        ..Default::default()
    };
    lines.iter().map(entry).collect()
}

/// No limit is zero for processes, as runc's shim tells it.
fn limit(stats: &NativeStats, file: &str) -> u64 {
    stats.find(file, "").filter(|limit| *limit != u64::MAX).unwrap_or(0)
}

fn to_v2(stats: &NativeStats) -> v2::Metrics {
    let cpu = |name| stats.get("cpu.stat", name);
    let events = |name| stats.get("memory.events", name);
    v2::Metrics {
        pids: MessageField::some(v2::PidsStat {
            current: stats.get("pids.current", ""),
            limit: limit(stats, "pids.max"),
            ..Default::default()
        }),
        cpu: MessageField::some(v2::CPUStat {
            usage_usec: cpu("usage_usec"),
            user_usec: cpu("user_usec"),
            system_usec: cpu("system_usec"),
            nr_periods: cpu("nr_periods"),
            nr_throttled: cpu("nr_throttled"),
            throttled_usec: cpu("throttled_usec"),
            ..Default::default()
        }),
        memory: MessageField::some(memory_v2(stats)),
        memory_events: MessageField::some(v2::MemoryEvents {
            low: events("low"),
            high: events("high"),
            max: events("max"),
            oom: events("oom"),
            oom_kill: events("oom_kill"),
            ..Default::default()
        }),
        io: MessageField::some(v2::IOStat { usage: io_v2(stats.devices("io.stat")), ..Default::default() }),
        ..Default::default()
    }
}

fn memory_v2(stats: &NativeStats) -> v2::MemoryStat {
    let of = |name| stats.get("memory.stat", name);
    v2::MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        workingset_refault: of("workingset_refault_anon") + of("workingset_refault_file"),
        workingset_activate: of("workingset_activate_anon") + of("workingset_activate_file"),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: stats.get("memory.current", ""),
        usage_limit: stats.get("memory.max", ""),
        max_usage: stats.get("memory.peak", ""),
        swap_usage: stats.get("memory.swap.current", ""),
        swap_limit: stats.get("memory.swap.max", ""),
        ..Default::default()
    }
}

/// One entry a device; its numbers follow each other.
fn io_v2(lines: &[DeviceLine]) -> Vec<v2::IOEntry> {
    let mut entries: Vec<v2::IOEntry> = Vec::new();
    for line in lines {
        let is_new = entries.last().is_none_or(|last| (last.major, last.minor) != (line.major, line.minor));
        if is_new {
            entries.push(v2::IOEntry { major: line.major, minor: line.minor, ..Default::default() });
        }
        let Some(entry) = entries.last_mut() else { continue };
        match line.name.as_str() {
            "rbytes" => entry.rbytes = line.value,
            "wbytes" => entry.wbytes = line.value,
            "rios" => entry.rios = line.value,
            "wios" => entry.wios = line.value,
            // Discards: the message has no field for them.
            _ => {}
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_messages_carry_the_names_containerd_knows() {
        let mut stats = NativeStats::default();
        assert_eq!(encode(&stats).unwrap().type_url, "io.containerd.cgroups.v1.Metrics");
        stats.unified = true;
        assert_eq!(encode(&stats).unwrap().type_url, "io.containerd.cgroups.v2.Metrics");
    }

    #[test]
    fn the_numbers_of_a_device_make_one_entry() {
        let line = |minor, name: &str, value| DeviceLine { major: 8, minor, name: name.into(), value };
        let entries = io_v2(&[line(0, "rbytes", 1), line(0, "wios", 2), line(16, "rbytes", 3)]);
        assert_eq!((entries.len(), entries[0].rbytes, entries[0].wios, entries[1].rbytes), (2, 1, 2, 3));
        assert_eq!(entries_of_v1(&line(0, "Read", 7)), ("Read".to_owned(), 7));
    }

    fn entries_of_v1(line: &DeviceLine) -> (String, u64) {
        let entry = entries(std::slice::from_ref(line)).remove(0);
        (entry.op, entry.value)
    }
}
