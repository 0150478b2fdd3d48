//! Linux programs and the process that holds them: what is left of either, and who notices the other.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::common::containerd::{Containerd, IDLE};
use crate::common::native::{exec_in, run, shell};
use crate::common::{Outcome, SOON, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("orphans_are_reaped_in_the_hosts_pid_namespace", orphans),
    ("a_killed_daemon_leaves_nothing", killed_daemon),
    ("sigterm_to_the_daemon_ends_them", drained),
    ("wasm_and_native_share_a_daemon", both),
    ("fifty_at_once", fifty),
    ("a_slow_runc_delays_nobody_else", slow_runc),
    ("it_survives_a_restart_of_containerd", restart),
    ("detach_and_attach", detach),
];

fn zombies_of(pid: u32) -> Result<Vec<u32>> {
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).context("the daemon is gone")?;
    let all = list.split_whitespace().filter_map(|child| child.parse().ok());
    let is_zombie = |child: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
    };
    Ok(all.filter(is_zombie).collect())
}

fn orphans(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native");
    // Each inner shell leaves a process to nobody; in the host's namespace that is us.
    let line =
        "for i in 1 2 3 4 5; do sh -c 'sleep 0.2 & exit 0'; done; sh -c 'sleep 700 & exit 0'; echo ready; sleep 1000";
    let run = shell(&client, line)?.option("--with-ns", &format!("pid:/proc/{}/ns/pid", std::process::id()));
    let job = run.spawn()?;
    job.stdout.wait_text("ready", SOON)?;
    let container = run.handle();
    let daemon = client.daemon()?;
    wait::until_true("the orphans to end", SOON, || Ok(container.ps()?.lines().count() <= 4))?;
    wait::until_true("no zombie of the daemon's", SOON, || Ok(zombies_of(daemon)?.is_empty()))?;
    let cgroup = cgroup_of(containerd, container.pid()?)?;
    container.kill("SIGKILL")?;
    ensure!(job.wait(SOON)?.code == Some(137));
    // What the first process leaves behind does not outlive it.
    wait::until_true("the cgroup to go", SOON, || Ok(!cgroup.exists()))?;
    client.expect_empty()
}

/// The folder of a process's cgroup, which has to be its own.
fn cgroup_of(containerd: &Containerd, pid: u32) -> Result<PathBuf> {
    let hierarchy = containerd.hierarchy()?;
    let place = hierarchy.place(pid)?;
    ensure!(place != "/", "process {pid} is in no cgroup of its own");
    Ok(hierarchy.folder(&place))
}

fn killed_daemon(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native-killed");
    let runs = ["sleep 1000 & sleep 1000", "trap '' TERM; while :; do sleep 1; done"];
    let containers = runs.iter().map(|line| shell(&client, line)?.detached()).collect::<Result<Vec<_>>>()?;
    let paused = run(&client, &["sleep", "1000"])?.detached()?;
    client.ctr(&["task", "pause", &paused.id])?;
    let mut seen = Vec::new();
    for container in containers.iter().chain([&paused]) {
        seen.push((container.pid()?, cgroup_of(containerd, container.pid()?)?));
    }
    let state = containerd.folder().join("state/runc/native-killed");
    ensure!(std::fs::read_dir(&state)?.count() == 3, "runc's state is not in {}", state.display());
    proc::signal(client.daemon()?, Signal::KILL)?;
    for container in containers.iter().chain([&paused]) {
        ensure!(container.exit()?.exit_code() == 137);
    }
    for (pid, cgroup) in seen {
        wait::until_true("its processes to end", SOON, || Ok(!proc::is_running(pid)))?;
        wait::until_true("its cgroup to go", SOON, || Ok(!cgroup.exists()))?;
    }
    let left = std::fs::read_dir(&state)?.count();
    ensure!(left == 0, "{left} containers are left in {}", state.display());
    drop((containers, paused));
    shell(&client, "exit 2")?.expect(2)?;
    client.expect_empty()
}

fn drained(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native-drained");
    let polite = shell(&client, "trap 'exit 4' TERM; while :; do sleep 0.1; done")?.detached()?;
    let stubborn = run(&client, &["sleep", "1000"])?.detached()?;
    let cgroup = cgroup_of(containerd, polite.pid()?)?;
    proc::signal(client.daemon()?, Signal::TERM)?;
    ensure!(polite.exit()?.exit_code() == 4);
    // The first process of a pid namespace gets no signal that it does not handle: it is cut off.
    ensure!(stubborn.exit()?.exit_code() == 137);
    wait::until_true("the daemon to end", SOON, || Ok(client.daemons().is_empty()))?;
    wait::until_true("the cgroup to go", SOON, || Ok(!cgroup.exists()))?;
    drop((polite, stubborn));
    client.expect_empty()
}

fn both(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native-both");
    let native = run(&client, &["sleep", "1000"])?.detached()?;
    let wasm = client.guest("/kit.wasm", &["sleep", "0"])?.detached()?;
    let daemon = client.daemon()?;
    ensure!(wasm.daemon()? == daemon);
    let refused = exec_in(&client, &wasm.id, "e", &["sh"])?.finish(SOON)?;
    ensure!(refused.stderr.contains("exec is not supported for wasm"), "{refused:?}");
    shell(&client, "exit 3")?.expect(3)?;
    client.guest("/kit.wasm", &["exit", "4"])?.expect(4)?;
    ensure!(native.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
    ensure!(wasm.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
    native.delete()?;
    wasm.delete()?;
    client.expect_empty()
}

fn fifty(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native-fifty");
    let first = run(&client, &["sleep", "1000"])?.detached()?;
    let daemon = client.daemon()?;
    let before = proc::holdings(daemon)?;
    let runs = (0..50).map(|_| shell(&client, "echo on; sleep 1000")).collect::<Result<Vec<_>>>()?;
    let jobs = runs.iter().map(|run| run.spawn()).collect::<Result<Vec<_>>>()?;
    for job in &jobs {
        job.stdout.wait_text("on", SOON * 2)?;
    }
    ensure!(client.daemon()? == daemon);
    for run in &runs {
        client.ctr(&["task", "kill", "--signal", "SIGKILL", &run.id])?;
    }
    for job in jobs {
        ensure!(job.wait(SOON)?.code == Some(137));
    }
    wait::until_true("the daemon to hold what it held before", SOON, || {
        Ok(proc::holdings(daemon)?.fit_in(before) && zombies_of(daemon)?.is_empty())
    })
    .with_context(|| format!("before {before:?}, after {:?}", proc::holdings(daemon)))?;
    first.kill_and_wait("SIGKILL")?;
    first.delete()?;
    client.expect_empty()?;
    wait::until_true("the daemon to end", IDLE + SOON, || Ok(!proc::is_running(daemon)))
}

fn slow_runc(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native-slow");
    let (options, binary) = (containerd.folder().join("slow.toml"), containerd.folder().join("slow-runc"));
    std::fs::write(&binary, "#!/bin/sh\ncase \"$*\" in *create*slow) sleep 8;; esac\nexec runc \"$@\"\n")?;
    rustix::fs::chmod(&binary, rustix::fs::Mode::from_raw_mode(0o755))?;
    std::fs::write(&options, format!("{}BinaryName = \"{}\"\n", containerd.default_options(), binary.display()))?;
    let slow = shell(&client, "exit 3")?.options(options.clone()).id("slow").spawn()?;
    let wasm = client.guest("/kit.wasm", &["exit", "4"])?.options(options.clone());
    // The first of all: it waits for the process to be there.
    wasm.expect(4)?;
    shell(&client, "exit 5")?.options(options).expect(5)?;
    wasm.expect(4)?;
    ensure!(!slow.is_over(), "the slow one was not slow");
    ensure!(client.daemons().len() == 1);
    ensure!(slow.finish(SOON)?.code == Some(3));
    client.expect_empty()
}

fn restart(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native-restart");
    let container = shell(&client, "trap 'exit 5' TERM; while :; do sleep 0.1; done")?.detached()?;
    let pid = container.pid()?;
    containerd.stop()?;
    containerd.launch()?;
    container.wait_status("RUNNING")?;
    ensure!(container.pid()? == pid && proc::is_running(pid));
    let done = exec_in(&client, &container.id, "after", &["sh", "-c", "exit 6"])?.finish(SOON)?;
    ensure!(done.code == Some(6), "{done:?}");
    let (exit, _) = container.kill_and_wait("SIGTERM")?;
    // The first exit that is seen may be the exec's.
    ensure!(matches!(exit.exit_code(), 5 | 6), "{exit:?}");
    container.wait_status("STOPPED")?;
    container.delete()?;
    client.expect_empty()
}

fn detach(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native");
    let run = shell(&client, "n=0; while :; do n=$((n+1)); echo line $n; sleep 0.05; done")?;
    let mut job = run.spawn()?;
    job.stdout.wait_text("line 3\n", SOON)?;
    job.kill()?;
    let container = run.handle();
    ensure!(container.status()?.as_deref() == Some("RUNNING"));
    let again = container.attach()?;
    again.stdout.wait_text("line ", SOON)?;
    // It would take the task away itself when that ends.
    drop(again);
    container.kill_and_wait("SIGKILL")?;
    container.delete()?;
    client.expect_empty()
}
