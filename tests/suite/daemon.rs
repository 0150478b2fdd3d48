//! The life of a shim process: it ends after its last container, and a signal to it ends everything in order.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;

use crate::common::containerd::{Containerd, IDLE};
use crate::common::ctr::{Client, Container};
use crate::common::{Outcome, SOON, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("it_ends_some_seconds_after_the_last_container", idle_end),
    ("a_container_in_between_keeps_it", kept),
    ("sigterm_stops_all", sigterm),
    ("sigint_stops_all", sigint),
    ("its_own_environment_and_folder_are_nobodys", detached),
    ("the_host_sees_none_of_its_mounts", mounts),
    ("metrics_tell_cpu_and_memory", metrics),
    ("task_ps_lists_a_process", ps),
    #[cfg(feature = "test-hooks")]
    ("a_panic_while_a_container_is_prepared_is_its_own", panic_of_one),
    #[cfg(feature = "test-hooks")]
    ("a_process_without_a_supervisor_ends", panic_of_all),
];

fn idle_end(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("idle");
    let container = client.guest("/kit.wasm", &["exit", "0"])?.detached()?;
    let daemon = client.daemon()?;
    let sockets = proc::sockets(daemon)?;
    ensure!(!sockets.is_empty(), "it listens nowhere");
    container.exit()?;
    container.delete()?;
    let begin = Instant::now();
    wait::until_true("the process to end", IDLE + SOON, || Ok(!proc::is_running(daemon)))?;
    let took = begin.elapsed();
    ensure!(took > IDLE / 2 && took < IDLE + Duration::from_secs(5), "it ended after {took:?}");
    ensure!(sockets.iter().all(|socket| !socket.exists()), "left sockets: {sockets:?}");
    Ok(())
}

fn kept(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("kept");
    client.guest("/kit.wasm", &["exit", "0"])?.expect(0)?;
    let daemon = client.daemon()?;
    for _ in 0..4 {
        std::thread::sleep(IDLE / 2);
        client.guest("/kit.wasm", &["exit", "0"])?.expect(0)?;
        ensure!(client.daemon()? == daemon, "it ended too early");
    }
    Ok(())
}

fn sigterm(containerd: &Containerd) -> Outcome {
    stops_all(containerd, "sigterm", Signal::TERM)
}

fn sigint(containerd: &Containerd) -> Outcome {
    stops_all(containerd, "sigint", Signal::INT)
}

/// Spinning and sleeping guests alike end as if each had been told; containerd hears of every one.
fn stops_all(containerd: &Containerd, namespace: &str, signal: Signal) -> Outcome {
    let client = containerd.namespace(namespace);
    let mut containers = Vec::new();
    for words in [["sleep", "0"], ["spin", ""], ["tick", "20"], ["sleep", "0"]] {
        containers.push(client.guest("/kit.wasm", &words)?.detached()?);
    }
    let daemon = containers[0].daemon()?;
    let sockets = proc::sockets(daemon)?;
    proc::signal(daemon, signal)?;
    for container in &containers {
        let exit = container.exit()?;
        ensure!(exit.exit_code() == 143, "{exit:?}");
    }
    wait::until_true("the process to end", SOON, || Ok(!proc::is_running(daemon)))?;
    ensure!(sockets.iter().all(|socket| !socket.exists()), "left sockets: {sockets:?}");
    let mounts = proc::mounts_below(containerd.folder())?;
    let of_shim = mounts.iter().filter(|mount| mount.contains(namespace)).collect::<Vec<_>>();
    ensure!(of_shim.is_empty(), "left mounts: {of_shim:?}");
    drop(containers);
    client.guest("/kit.wasm", &["exit", "3"])?.expect(3)?;
    client.expect_empty()
}

fn sleeper<'a>(client: &Client<'a>) -> Result<(Container<'a>, u32)> {
    let container = client.guest("/sleeper.wasm", &[])?.detached()?;
    let daemon = container.daemon()?;
    Ok((container, daemon))
}

/// It outlives the bundle that launched it, so it must not sit in it; and who may read it learns nothing of containerd.
fn detached(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("detached");
    let (container, daemon) = sleeper(&client)?;
    let folder = std::fs::read_link(format!("/proc/{daemon}/cwd"))?;
    ensure!(folder == std::path::Path::new("/"), "its folder is {}", folder.display());
    let environment = String::from_utf8_lossy(&std::fs::read(format!("/proc/{daemon}/environ"))?).into_owned();
    ensure!(!environment.contains("TROUPE_TEST_SECRET"), "its environment is containerd's");
    ensure!(container.pid()? != daemon, "the task's pid is the process's");
    container.kill_and_wait("SIGKILL")?;
    container.delete()
}

fn mounts(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("mounts");
    let (container, daemon) = sleeper(&client)?;
    let own = proc::mounts(&daemon.to_string())?;
    ensure!(own.iter().any(|mount| mount.contains(&container.id)), "no root filesystem in {own:?}");
    let host = proc::mounts("self")?;
    ensure!(!host.iter().any(|mount| mount.contains(&format!("/{}/", container.id))), "the host sees it: {host:?}");
    container.kill_and_wait("SIGKILL")?;
    container.delete()?;
    let left = proc::mounts(&daemon.to_string())?;
    ensure!(left.len() < own.len(), "its mount is still there: {left:?}");
    Ok(())
}

fn metrics(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("metrics");
    let container = client.guest("/kit.wasm", &["spin"])?.detached()?;
    let text = wait::until("some metrics", SOON, || Ok(Some(container.metrics()?)))?;
    ensure!(text.contains("memory") && text.contains("cpu"), "{text}");
    container.kill_and_wait("SIGKILL")?;
    container.delete()
}

fn ps(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("ps");
    let (container, _) = sleeper(&client)?;
    let pid = container.pid()?.to_string();
    let table = container.ps()?;
    ensure!(table.lines().skip(1).any(|line| line.split_whitespace().next() == Some(&pid)), "{table}");
    container.kill_and_wait("SIGKILL")?;
    container.delete()
}

#[cfg(feature = "test-hooks")]
fn panic_of_one(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("panic-one");
    let neighbour = client.guest("/sleeper.wasm", &[])?.detached()?;
    // Twice: the id is free again.
    for _ in 0..2 {
        client.guest("/hello.wasm", &["0"])?.id("panics-when-prepared").expect_error("preparing it")?;
    }
    ensure!(neighbour.status()?.as_deref() == Some("RUNNING"), "the neighbour is gone");
    neighbour.kill_and_wait("SIGKILL")?;
    neighbour.delete()?;
    client.expect_empty()
}

/// containerd learns that its containers are gone, and the next one gets a process that works.
#[cfg(feature = "test-hooks")]
fn panic_of_all(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("panic-all");
    let neighbour = client.guest("/sleeper.wasm", &[])?.detached()?;
    let daemon = neighbour.daemon()?;
    let sockets = proc::sockets(daemon)?;
    ensure!(!sockets.is_empty(), "it listens nowhere");
    let culprit = client.guest("/hello.wasm", &["0"])?.id("panics-when-started");
    ensure!(culprit.to_end()?.code != Some(0), "it did not panic");
    wait::until_true("the process to end", SOON, || Ok(!proc::is_running(daemon)))?;
    ensure!(sockets.iter().all(|socket| !socket.exists()), "left sockets: {sockets:?}");
    let exit = neighbour.exit()?;
    ensure!(exit.exit_code() == 137, "{exit:?}");
    client.guest("/kit.wasm", &["exit", "7"])?.expect(7)?;
    ensure!(client.daemon()? != daemon, "the same process");
    drop((neighbour, culprit.handle()));
    client.expect_empty()
}
