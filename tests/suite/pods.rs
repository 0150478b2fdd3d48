//! Pods as a kubelet makes them, through CRI: sandboxes without a process, their networks, and wasm containers in them.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::common::containerd::Containerd;
use crate::common::cri::{self, Kubelet, Pod};
use crate::common::http::{self, Answer, Protocol};
use crate::common::node::{Cgroups, SUBNET};
use crate::common::{Outcome, SOON, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("a_sandbox_is_namespaces_and_no_process", sandbox),
    ("two_pods_serve_on_the_same_port", two_pods),
    ("containers_of_a_pod_share_its_loopback", loopback),
    ("a_pod_on_the_nodes_network_serves_there", host_network),
    ("a_command_ends_and_its_log_is_read", command),
    ("a_container_that_cannot_be_is_refused_and_leaves_nothing", refused),
    ("containerd_restarts_and_finds_its_pods", restart),
    ("a_pod_whose_process_was_killed_is_told_and_removed", killed),
    ("a_stop_lets_requests_finish", graceful),
    ("statistics_say_what_a_request_burnt", statistics),
];

/// Nothing of any pod may be left: no sandbox, cable, mount or anchor thread.
pub fn expect_empty(kubelet: &Kubelet<'_>) -> Outcome {
    let pods = kubelet.pods()?;
    ensure!(pods.is_empty(), "pods are left: {pods:?}");
    let veths = kubelet.node()?.veths()?;
    ensure!(veths == 0, "{veths} cables are left");
    let networks = proc::mounts_below(&kubelet.containerd.folder().join("state"))?;
    let networks: Vec<_> = networks.iter().filter(|mount| mount.contains("netns")).collect();
    ensure!(networks.is_empty(), "network namespaces are left: {networks:?}");
    for shim in kubelet.containerd.shims() {
        ensure!(anchors(shim)? == 0, "an anchor thread is left in {shim}");
    }
    Ok(())
}

/// Anchor threads of a daemon.
pub fn anchors(daemon: u32) -> Result<usize> {
    let tasks = std::fs::read_dir(format!("/proc/{daemon}/task"))?;
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    Ok(names.filter(|name| name.trim() == "anchor").count())
}

/// One request from the node.
pub fn get(kubelet: &Kubelet<'_>, addr: SocketAddr, path: &str) -> Result<Answer> {
    kubelet.node()?.inside(|| http::block_on(http::get(addr, Protocol::One, path)))
}

pub fn addr(pod: &Pod<'_>, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(pod.ip()?, port))
}

fn sandbox(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let pod = kubelet.run(kubelet.pod("alone")?)?;
    ensure!(pod.is_ready()?);
    let (pid, ip) = (pod.pid()?, pod.ip()?);
    ensure!(ip.to_string().starts_with(SUBNET), "{ip}");
    // The pid is a thread of the one daemon, in the pod's namespaces; nothing else runs.
    let daemon = proc::group_leader(pid)?;
    ensure!(containerd.shims() == [daemon] && containerd.shim_processes() == [daemon], "{:?}", containerd.shims());
    for (kind, is_its_own) in [("net", true), ("ipc", true), ("uts", true), ("pid", false)] {
        let of = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/{kind}"));
        ensure!((of(pid)? != of(daemon)?) == is_its_own, "{kind}");
    }
    let inside = |words: &[&str]| -> Result<String> {
        let mut command = std::process::Command::new("nsenter");
        command.args(["-t", &pid.to_string(), "--net", "--uts"]).args(words);
        crate::common::job::run(command, SOON)?.success("nsenter")
    };
    ensure!(inside(&["hostname"])?.trim() == "alone");
    ensure!(inside(&["ip", "-o", "addr"])?.contains(&ip.to_string()));
    pod.stop()?;
    ensure!(!pod.is_ready()?);
    pod.stop().context("stopped a second time")?;
    pod.remove()?;
    expect_empty(&kubelet)
}

fn two_pods(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let pods = [kubelet.run(kubelet.pod("one")?)?, kubelet.run(kubelet.pod("two")?)?];
    let webs = pods.iter().map(|pod| pod.web("web", &[])).collect::<Result<Vec<_>>>()?;
    for pod in &pods {
        get(&kubelet, addr(pod, 8080)?, "/hello")?.expect(200, "hello\n")?;
    }
    // The node itself has nothing on that port, and a pod reaches the other one.
    let node = SocketAddr::from(([127, 0, 0, 1], 8080));
    ensure!(get(&kubelet, node, "/hello").is_err(), "a pod serves on the node's address");
    let through = format!("/fetch?url=http://{}/hello", addr(&pods[1], 8080)?);
    get(&kubelet, addr(&pods[0], 8080)?, &through)?.expect(200, "hello\n")?;
    for web in webs {
        web.stop(Duration::from_secs(10))?;
        ensure!(web.status()?.exit_code == 0, "{:?}", web.status()?);
    }
    pods.into_iter().try_for_each(Pod::remove)?;
    expect_empty(&kubelet)
}

fn loopback(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let pod = kubelet.run(kubelet.pod("pair")?)?;
    let front = pod.web("front", &[])?;
    let back = pod.web("back", &[("SOCKET_ADDR", "127.0.0.1:8081")])?;
    for host in ["127.0.0.1", "localhost"] {
        get(&kubelet, addr(&pod, 8080)?, &format!("/fetch?url=http://{host}:8081/hello"))?.expect(200, "hello\n")?;
    }
    // Its loopback is nobody else's.
    let other = kubelet.run(kubelet.pod("other")?)?;
    other.web("web", &[])?;
    let refused = get(&kubelet, addr(&other, 8080)?, "/fetch?url=http://127.0.0.1:8081/hello")?;
    ensure!(refused.header("x-error") == Some("ConnectionRefused"), "{refused:?}");
    // Two on one port, in one pod: the second one is told.
    let taken = pod.guest("third", &[crate::common::site::WEB], |_| {})?.start();
    let error = taken.err().context("two servers on one port")?;
    ensure!(format!("{error:#}").contains("listen on 0.0.0.0:8080: Address already in use"), "{error:#}");
    for container in [front, back] {
        container.stop(Duration::from_secs(10))?;
        container.remove()?;
    }
    pod.remove()?;
    other.remove()?;
    expect_empty(&kubelet)
}

fn host_network(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let mut config = kubelet.pod("host")?;
    cri::on_host_network(&mut config);
    let pod = kubelet.run(config)?;
    let web = pod.guest("web", &[crate::common::site::WEB], |config| {
        cri::on_host_network_too(config);
        config.envs = vec![cri::variable("WASMTIME_HTTP_PROXY_SOCKET_ADDR", "127.0.0.1:8082")];
    })?;
    web.start()?;
    get(&kubelet, SocketAddr::from(([127, 0, 0, 1], 8082)), "/hello")?.expect(200, "hello\n")?;
    pod.remove()?;
    expect_empty(&kubelet)
}

fn command(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let pod = kubelet.run(kubelet.pod("job")?)?;
    let echo = pod.guest("echo", &["/kit.wasm", "echo", "from", "a", "pod"], |_| {})?;
    echo.start()?;
    ensure!(echo.expect(0)? == "from a pod\n", "{:?}", echo.log());
    let seven = pod.guest("seven", &["/kit.wasm", "exit", "7"], |_| {})?;
    seven.start()?;
    seven.expect(7)?;
    // Another attempt of the same one, as a kubelet restarts it.
    echo.remove()?;
    let again = pod.guest("echo", &["/kit.wasm", "echo", "again"], |_| {})?;
    again.start()?;
    ensure!(again.expect(0)?.ends_with("again\n"));
    pod.remove()?;
    expect_empty(&kubelet)
}

fn refused(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let pod = kubelet.run(kubelet.pod("wrong")?)?;
    let missing = pod.guest("missing", &["/nothing.wasm"], |_| {})?;
    let error = missing.start().err().context("a missing program was started")?;
    ensure!(format!("{error:#}").contains("/nothing.wasm: no such file"), "{error:#}");
    ensure!(pod.is_ready()?, "a container that fails takes its pod along");
    pod.remove()?;
    expect_empty(&kubelet)
}

fn restart(containerd: &Containerd) -> Outcome {
    let own = Containerd::start_node(containerd.version, &format!("{}-pods", containerd.version), Cgroups::Machine)?;
    let kubelet = Kubelet::connect(&own)?;
    let pod = kubelet.run(kubelet.pod("stays")?)?;
    pod.web("web", &[])?;
    let (pid, at) = (pod.pid()?, addr(&pod, 8080)?);
    own.stop()?;
    get(&kubelet, at, "/hello")?.expect(200, "hello\n")?;
    own.launch()?;
    // Connections of before are gone with it.
    let kubelet = Kubelet::connect(&own)?;
    wait::until_true("CRI to be ready again", SOON, || Ok(kubelet.pods().is_ok_and(|pods| pods.len() == 1)))?;
    let found = kubelet.adopt(&pod)?;
    ensure!(found.is_ready()? && found.pid()? == pid, "{:?}", found.status()?);
    get(&kubelet, at, "/hello")?.expect(200, "hello\n")?;
    // A further container joins it.
    let echo = found.guest("echo", &["/kit.wasm", "echo", "later"], |_| {})?;
    echo.start()?;
    echo.expect(0)?;
    drop(pod);
    found.remove()?;
    expect_empty(&kubelet)?;
    own.close()
}

fn killed(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let pod = kubelet.run(kubelet.pod("lost")?)?;
    let web = pod.web("web", &[])?;
    let daemon = proc::group_leader(pod.pid()?)?;
    kill_process(Pid::from_raw(i32::try_from(daemon)?).context("a pid")?, Signal::KILL)?;
    let status = web.ended()?;
    ensure!(status.exit_code == 137 || status.exit_code == 255, "{status:?}");
    wait::until_true("the pod to be told", SOON, || Ok(!pod.is_ready()?))?;
    // A container that comes late is not let into whatever has the number of its sandbox now.
    ensure!(pod.guest("late", &["/kit.wasm", "echo"], |_| {}).and_then(|late| late.start()).is_err());
    pod.remove()?;
    expect_empty(&kubelet)
}

/// A kubelet's stop: SIGTERM, and time to finish.
fn graceful(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let pod = kubelet.run(kubelet.pod("drain")?)?;
    let web = pod.web("web", &[])?;
    let (at, node) = (addr(&pod, 8080)?, kubelet.node()?);
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| {
            let path = "/sleep?ms=700&say=begun";
            node.inside(|| http::block_on(http::get(at, Protocol::One, path)))
        });
        web.wait_log("begun")?;
        web.stop(Duration::from_secs(10))?;
        let answer = slow.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
        ensure!(answer.status == 200, "{answer:?}");
        Ok(())
    })?;
    ensure!(web.status()?.exit_code == 0, "{:?}", web.status()?);
    pod.remove()?;
    expect_empty(&kubelet)
}

/// CRI's own figures, of a container that burns a known time.
fn statistics(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let pod = kubelet.run(kubelet.pod("busy")?)?;
    let web = pod.web("web", &[])?;
    let burnt = |web: &cri::PodContainer<'_>| -> Result<u64> {
        let cpu = web.stats()?.cpu.context("no CPU statistics")?;
        Ok(cpu.usage_core_nano_seconds.context("no CPU time")?.value / 1_000_000)
    };
    let before = burnt(&web)?;
    get(&kubelet, addr(&pod, 8080)?, "/spin?ms=400")?.expect(200, "spun\n")?;
    // What it says is read once in a while on some versions.
    let spent = wait::until("the CPU time to be told", SOON, || {
        let spent = burnt(&web)?.saturating_sub(before);
        Ok((spent >= 100).then_some(spent))
    })?;
    // The guest spins by the clock, on a core that it may have to share.
    ensure!((100..=500).contains(&spent), "{spent} ms for 400 of spinning");
    pod.remove()?;
    expect_empty(&kubelet)
}
