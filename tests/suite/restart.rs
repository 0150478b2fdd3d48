//! containerd stops and comes back, or a shim process dies: what runs goes on, what ended is told.
//!
//! Each case has a containerd of its own, since the others would notice.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use containerd_shim_protos::api;
use rustix::process::Signal;

use crate::common::containerd::Containerd;
use crate::common::ctr::{Client, Container};
use crate::common::{Outcome, SOON, base, proc, shim, wait};

pub const CASES: crate::common::Cases = &[
    ("running_containers_are_found_again", found_again),
    ("output_goes_on_to_who_attaches", output_goes_on),
    ("an_exit_in_between_is_not_lost", exit_in_between),
    ("a_crash_of_containerd_is_no_different", crash),
    ("a_killed_daemon_is_told_for_each_container", daemon_killed),
];

const NAMESPACE: &str = "restart";

/// Runs a case with a containerd of the same version that it may stop.
fn own(containerd: &Containerd, name: &str, case: impl FnOnce(&Containerd) -> Outcome) -> Outcome {
    let own = Containerd::start(containerd.version, &format!("{}-{name}", containerd.version))?;
    case(&own).map_err(|error| error.context(format!("its own containerd: {}\n", own.log_since(0))))?;
    own.close()
}

fn ticking<'a>(client: &Client<'a>, log: &Path) -> Result<Container<'a>> {
    client.guest("/kit.wasm", &["tick", "20"])?.logged(log)
}

fn ticks(log: &Path) -> usize {
    fs::read_to_string(log).map_or(0, |text| text.lines().count())
}

fn expect_more_ticks(log: &Path) -> Outcome {
    let before = ticks(log);
    wait::until_true("more ticks", SOON, || Ok(ticks(log) > before + 2))
}

fn found_again(containerd: &Containerd) -> Outcome {
    own(containerd, "found", |containerd| {
        let client = containerd.namespace(NAMESPACE);
        let logs = base::folder(&format!("logs/{}", containerd.version))?;
        let containers =
            (0..5).map(|number| ticking(&client, &logs.join(format!("{number}")))).collect::<Result<Vec<_>>>()?;
        let daemon = containers[0].daemon()?;
        containerd.stop()?;
        (0..5).try_for_each(|number| expect_more_ticks(&logs.join(format!("{number}"))))?;
        containerd.launch()?;
        let running = client.tasks()?.iter().filter(|(_, status)| status == "RUNNING").count();
        ensure!(running == 5, "{:?}", client.tasks()?);
        (0..5).try_for_each(|number| expect_more_ticks(&logs.join(format!("{number}"))))?;
        // A further container joins the same process.
        client.guest("/kit.wasm", &["exit", "3"])?.expect(3)?;
        for container in containers {
            ensure!(container.daemon()? == daemon);
            ensure!(container.kill_and_wait("SIGTERM")?.0.exit_code() == 143);
            container.delete()?;
        }
        client.expect_empty()
    })
}

/// Into the FIFOs, whose reader went away with containerd's client.
fn output_goes_on(containerd: &Containerd) -> Outcome {
    own(containerd, "output", |containerd| {
        let run = containerd.namespace(NAMESPACE).guest("/kit-component.wasm", &["tick", "20"])?;
        let mut job = run.spawn()?;
        job.stdout.wait_text("tick 2 ", SOON)?;
        job.kill()?;
        containerd.stop()?;
        containerd.launch()?;
        let container = run.handle();
        let attached = container.attach()?;
        attached.stdout.wait_text("tick 1", SOON)?;
        ensure!(container.kill_and_wait("SIGTERM")?.0.exit_code() == 143);
        ensure!(attached.wait(SOON)?.code == Some(143));
        Ok(())
    })
}

fn exit_in_between(containerd: &Containerd) -> Outcome {
    own(containerd, "between", |containerd| {
        let client = containerd.namespace(NAMESPACE);
        // So that the process does not leave while nobody is there to be told.
        let neighbour = client.guest("/sleeper.wasm", &[])?.detached()?;
        let container = client.guest("/kit.wasm", &["exit-after", "700", "7"])?.detached()?;
        let daemon = container.daemon()?;
        containerd.stop()?;
        expect_exited(daemon, &container.id, 7)?;
        containerd.launch()?;
        container.wait_status("STOPPED")?;
        ensure!(container.attach()?.wait(SOON)?.code == Some(7), "containerd forgot the code");
        // `ctr task attach` took the task away when it told its code.
        drop(container);
        ensure!(neighbour.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
        neighbour.delete()
    })
}

/// Asks the daemon itself: containerd is not there.
fn expect_exited(daemon: u32, id: &str, code: u32) -> Outcome {
    let sockets = proc::sockets(daemon)?;
    ensure!(sockets.len() == 1, "the daemon listens on {sockets:?}");
    let address = format!("unix://{}", sockets[0].display());
    let request = api::WaitRequest { id: id.to_owned(), ..Default::default() };
    let response: api::WaitResponse = shim::call(&address, "containerd.task.v2.Task", "Wait", &request)?;
    ensure!(response.exit_status == code, "{response:?}");
    Ok(())
}

fn crash(containerd: &Containerd) -> Outcome {
    own(containerd, "crash", |containerd| {
        let client = containerd.namespace(NAMESPACE);
        let log = base::folder(&format!("logs/{}", containerd.version))?.join("crash");
        let container = ticking(&client, &log)?;
        containerd.kill()?;
        expect_more_ticks(&log)?;
        containerd.launch()?;
        ensure!(container.status()?.as_deref() == Some("RUNNING"));
        expect_more_ticks(&log)?;
        ensure!(container.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
        container.delete()
    })
}

fn daemon_killed(containerd: &Containerd) -> Outcome {
    own(containerd, "killed", |containerd| {
        let client = containerd.namespace(NAMESPACE);
        let containers = (0..5).map(|_| client.guest("/sleeper.wasm", &[])?.detached()).collect::<Result<Vec<_>>>()?;
        let daemon = containers[0].daemon()?;
        let sockets = proc::sockets(daemon)?;
        proc::signal(daemon, Signal::KILL)?;
        // At once, while containerd still cleans up after the others.
        client.guest("/kit.wasm", &["exit", "3"])?.expect(3)?;
        for container in &containers {
            let exit = container.exit_within(Duration::from_secs(30))?;
            ensure!(exit.exit_code() == 137, "{exit:?}");
        }
        wait::until_true("the tasks to be gone or stopped", SOON, || {
            Ok(client.tasks()?.iter().all(|(_, status)| status == "STOPPED"))
        })?;
        let mounts = proc::mounts_below(containerd.folder())?;
        ensure!(mounts.is_empty(), "left mounts: {mounts:?}");
        drop(containers);
        client.expect_empty()?;
        wait::until_true("the last shim to end", SOON, || Ok(containerd.shims().is_empty()))?;
        ensure!(sockets.iter().all(|socket| !socket.exists()), "left sockets: {sockets:?}");
        Ok(())
    })
}
