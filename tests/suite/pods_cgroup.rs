//! The group `pod`: a process for each pod, in the pod's own cgroup, where the kernel counts and limits it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::pods::{addr, expect_empty, get};
use crate::common::cgroup::Hierarchy;
use crate::common::containerd::{Containerd, IDLE};
use crate::common::cri::{Kubelet, Pod};
use crate::common::{Outcome, SOON, proc, wait};

pub const CASES: crate::common::Cases =
    &[("the_process_of_a_pod_is_in_its_cgroup", of_its_own), ("a_killed_process_leaves_no_cgroup", killed)];

/// They need a cgroup that counts.
pub const COUNTED: crate::common::Cases = &[("the_statistics_of_a_pod_are_those_of_its_cgroup", statistics)];

/// As a kubelet makes it before the pod, and removes it afterwards.
struct Parent {
    name: String,
    folder: PathBuf,
    hierarchy: Hierarchy,
}

impl Parent {
    fn create(containerd: &Containerd, name: &str) -> Result<Self> {
        let name = format!("/trp{}-{}-{name}", std::process::id(), containerd.version);
        let hierarchy = containerd.hierarchy()?;
        let folder = hierarchy.folder(&name);
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(Self { name, folder, hierarchy })
    }

    fn leaf(&self, pod: &Pod<'_>) -> PathBuf {
        self.folder.join(&pod.id)
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        // In every hierarchy that there is: the shim makes what is missing.
        for root in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path()) {
            let _ = fs::remove_dir(root.join(self.name.trim_start_matches('/')));
        }
        let _ = fs::remove_dir(&self.folder);
    }
}

fn run<'a>(kubelet: &'a Kubelet<'_>, parent: &Parent, name: &str) -> Result<Pod<'a>> {
    let mut config = kubelet.pod(name)?;
    config.annotations.insert("troupe.dev/group".into(), "pod".into());
    config.linux.get_or_insert_default().cgroup_parent = parent.name.clone();
    kubelet.run(config)
}

fn of_its_own(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let parent = Parent::create(containerd, "own")?;
    let pods = [run(&kubelet, &parent, "one")?, run(&kubelet, &parent, "two")?];
    let mut daemons = Vec::new();
    for pod in &pods {
        pod.web("web", &[])?;
        get(&kubelet, addr(pod, 8080)?, "/hello")?.expect(200, "hello\n")?;
        let daemon = proc::group_leader(pod.pid()?)?;
        let place = parent.hierarchy.place(daemon)?;
        ensure!(place == format!("{}/{}", parent.name, pod.id), "{place}");
        if parent.hierarchy.counts_memory() {
            let used = fs::read_to_string(parent.leaf(pod).join("memory.usage_in_bytes"))
                .or_else(|_| fs::read_to_string(parent.leaf(pod).join("memory.current")))?;
            ensure!(used.trim().parse::<u64>()? > 1 << 20, "the kernel counts {used} bytes");
        }
        daemons.push(daemon);
    }
    ensure!(daemons[0] != daemons[1], "two pods share the process {daemons:?}");
    let leaves = [parent.leaf(&pods[0]), parent.leaf(&pods[1])];
    pods.into_iter().try_for_each(Pod::remove)?;
    // The process goes a while after its last container, and takes its cgroup along.
    for (daemon, leaf) in daemons.into_iter().zip(leaves) {
        wait::until_true("the process to end", IDLE + SOON, || Ok(!proc::is_running(daemon)))?;
        wait::until_true("its cgroup to go", SOON, || Ok(!leaf.exists()))?;
    }
    expect_empty(&kubelet)
}

fn killed(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let parent = Parent::create(containerd, "killed")?;
    let pod = run(&kubelet, &parent, "lost")?;
    let leaf = parent.leaf(&pod);
    ensure!(leaf.exists(), "{}", leaf.display());
    proc::signal(proc::group_leader(pod.pid()?)?, Signal::KILL)?;
    wait::until_true("the pod to be told", SOON, || Ok(!pod.is_ready()?))?;
    pod.remove()?;
    wait::until_true("its cgroup to go", SOON, || Ok(!leaf.exists()))?;
    expect_empty(&kubelet)
}

/// The kernel's figures of the pod, and the shim's of the container in it, of a request that burns a known time.
fn statistics(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let parent = Parent::create(containerd, "stats")?;
    let pod = run(&kubelet, &parent, "busy")?;
    let web = pod.web("web", &[])?;
    get(&kubelet, addr(&pod, 8080)?, "/spin?ms=400")?.expect(200, "spun\n")?;
    let Some(stats) = pod.stats()? else {
        ensure!(containerd.version == "1.6", "containerd {} has no statistics of pods", containerd.version);
        return pod.remove();
    };
    let linux = stats.linux.context("no statistics of Linux")?;
    let spent = linux.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).context("no CPU time of the pod")?.value;
    let used = linux.memory.and_then(|memory| memory.working_set_bytes).context("no memory of the pod")?.value;
    // The process itself, and the start of the server, are the pod's as well.
    ensure!((100_000_000..20_000_000_000).contains(&spent) && used > 1 << 20, "{spent} ns, {used} bytes");
    let of_web = linux.containers.iter().find(|one| one.attributes.as_ref().is_some_and(|it| it.id == web.id));
    let theirs =
        of_web.and_then(|one| one.cpu.as_ref()?.usage_core_nano_seconds).context("no CPU time of the server")?;
    ensure!((50_000_000..=spent).contains(&theirs.value), "{} ns of {spent}", theirs.value);
    pod.remove()?;
    expect_empty(&kubelet)
}
