//! The pool in which the instances of servers live: slots mapped once, cleaned after each request.
//!
//! ```text
//!   take a slot ─▶ the request writes to some pages ─▶ clean: Scan  ask the kernel which pages, write those back
//!                                                            Remap let the kernel drop them all (madvise)
//! ```
//! Invariant: whoever takes a slot finds what its program starts with and nothing of the one before. `Scan` keeps it only
//! while no page of the pool can leave memory: the scan asks for pages that are present, and one that was swapped out is
//! not (`swap.rs` watches that). It saves the page faults that cost a small request three quarters of its time.
//!
//! Called by `engine.rs` alone.

use wasmtime::{Enabled, InstanceAllocationStrategy, PoolingAllocationConfig};

/// How a slot is cleaned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reset {
    /// Only the pages that were written, in place.
    Scan,
    /// All of them, by giving them back.
    Remap,
}

/// Requests that can run at once in this process. Address space is all that an unused slot costs.
pub const INSTANCES: u32 = 1000;

/// Instances that may wait for a next request (`INSTANCE_REUSE`), besides.
pub const IDLE_INSTANCES: u32 = 500;

const ALL: u32 = INSTANCES + IDLE_INSTANCES;

/// A component is several core instances: the program, its adapter, shims between them.
const CORE_INSTANCES: u32 = 8 * ALL;
/// Components of several programs, each with a memory of its own, are rare.
const MEMORIES: u32 = 2 * ALL;
const TABLES: u32 = 6 * ALL;

/// Guests of languages with garbage collection are few, and each of these takes as much address space as a memory.
const GC_HEAPS: u32 = 200;

/// What one component may consist of; beyond is an error when it is loaded, not when it is asked for.
const MAX_PARTS: u32 = 200;
const MAX_MEMORIES: u32 = 20;
const MAX_TABLES: u32 = 40;

/// The most a 32-bit memory can have, so that nothing that ran elsewhere is refused here: address space only.
const MEMORY: usize = 4 << 30;
/// Entries of one table: large programs have some ten thousand functions in theirs.
const TABLE_ENTRIES: usize = 100_000;
/// Wasmtime's own bookkeeping of one instance or component, in bytes: grows with the number of functions.
const INSTANCE_SIZE: usize = 4 << 20;

/// What a slot keeps in memory while nobody uses it, in bytes: the pages that requests write to again and again.
const KEEP_MEMORY: usize = 1 << 20;
const KEEP_TABLE: usize = 64 << 10;
/// Slots that stay warm, over all programs: bounds what an idle process holds on to.
const WARM: u32 = 128;

/// The allocation strategy of an engine for servers.
pub fn strategy(reset: Reset) -> InstanceAllocationStrategy {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(ALL)
        .total_core_instances(CORE_INSTANCES)
        .total_memories(MEMORIES)
        .total_tables(TABLES)
        .total_stacks(ALL)
        .total_gc_heaps(GC_HEAPS)
        .max_core_instances_per_component(MAX_PARTS)
        .max_memories_per_component(MAX_MEMORIES)
        .max_tables_per_component(MAX_TABLES)
        .max_tables_per_module(MAX_TABLES)
        .max_core_instance_size(INSTANCE_SIZE)
        .max_component_instance_size(INSTANCE_SIZE)
        .max_memory_size(MEMORY)
        .table_elements(TABLE_ENTRIES)
        .max_unused_warm_slots(WARM);
    match reset {
        Reset::Scan => {
            pool.pagemap_scan(Enabled::Yes).linear_memory_keep_resident(KEEP_MEMORY).table_keep_resident(KEEP_TABLE)
        }
        Reset::Remap => pool.pagemap_scan(Enabled::No),
    };
    pool.into()
}

/// Whether this kernel can tell which pages were written (Linux 6.7, `PAGEMAP_SCAN`).
pub fn can_scan() -> bool {
    PoolingAllocationConfig::is_pagemap_scan_available()
}
