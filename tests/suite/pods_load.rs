//! Many pods at once, each with a network of its own; then none, and nothing left of them.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::ensure;

use super::pods::{addr, anchors, expect_empty, get};
use crate::common::containerd::{Containerd, VERSIONS};
use crate::common::cri::{Kubelet, Pod};
use crate::common::{Outcome, SOON, proc, wait};

pub const CASES: crate::common::Cases = &[("a_hundred_pods_at_once_come_and_go", hundred)];

/// Callers at once, as a kubelet has them after a node's restart.
const CALLERS: usize = 4;

fn hundred(containerd: &Containerd) -> Outcome {
    // The shim's part is the same on all versions, and most of the time goes into CNI's programs.
    let count = if Some(&containerd.version) == VERSIONS.last() { 100 } else { 20 };
    let kubelet = Kubelet::connect(containerd)?;
    // Keeps the daemon, and has it warm.
    let first = kubelet.run(kubelet.pod("first")?)?;
    first.web("web", &[])?;
    get(&kubelet, addr(&first, 8080)?, "/hello")?.expect(200, "hello\n")?;
    let daemon = proc::group_leader(first.pid()?)?;
    let before = proc::holdings(daemon)?;
    side_by_side(containerd, count)?;
    ensure!(containerd.shims() == [daemon], "the pods were in {:?}, not in {daemon}", containerd.shims());
    ensure!(anchors(daemon)? == 1 && kubelet.node()?.veths()? == 1, "{} anchors", anchors(daemon)?);
    // Threads of pools end a while after their work.
    wait::until_true("the daemon to hold what it held before", SOON, || Ok(proc::holdings(daemon)?.fit_in(before)))
        .map_err(|error| error.context(format!("{before:?}, then {:?}", proc::holdings(daemon))))?;
    first.remove()?;
    expect_empty(&kubelet)
}

/// Runs so many, keeps all of them until each has served, and removes them.
fn side_by_side(containerd: &Containerd, count: usize) -> Outcome {
    let (next, there, addresses) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(HashSet::new()));
    let caller = || -> Outcome {
        let kubelet = Kubelet::connect(containerd)?;
        let mut pods: Vec<Pod<'_>> = Vec::new();
        while next.fetch_add(1, Ordering::Relaxed) < count {
            let pod = kubelet.run(kubelet.pod("many")?)?;
            pod.web("web", &[])?;
            get(&kubelet, addr(&pod, 8080)?, "/hello")?.expect(200, "hello\n")?;
            addresses.lock().unwrap_or_else(PoisonError::into_inner).insert(pod.ip()?);
            pods.push(pod);
            there.fetch_add(1, Ordering::Relaxed);
        }
        // A caller that failed leaves the others waiting in vain: they say so.
        wait::until_true("all pods to be there", 6 * SOON, || Ok(there.load(Ordering::Relaxed) == count))?;
        for pod in pods {
            get(&kubelet, addr(&pod, 8080)?, "/hello")?.expect(200, "hello\n")?;
            pod.remove()?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let callers: Vec<_> = (0..CALLERS).map(|_| scope.spawn(caller)).collect();
        let ends: Vec<_> = callers.into_iter().map(|caller| caller.join()).collect();
        ends.into_iter().try_for_each(|end| end.map_err(|_| anyhow::anyhow!("a caller panicked"))?)
    })?;
    let addresses = addresses.into_inner().unwrap_or_else(PoisonError::into_inner);
    ensure!(addresses.len() == count, "{count} pods had {} addresses", addresses.len());
    Ok(())
}
