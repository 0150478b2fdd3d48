//! After the worst: containerd away more than once, the daemon killed, both at the same time. No output, exit or event
//! is lost that could be kept, and nothing stays of what could not.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::common::containerd::Containerd;
use crate::common::ctr::{Client, Container};
use crate::common::job::Collected;
use crate::common::recorder::Recorder;
use crate::common::shim::{self, Shim};
use crate::common::{Outcome, SOON, base, guests, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("output_is_complete_over_many_restarts", outlives),
    ("a_killed_daemon_leaves_nothing_and_is_replaced", daemon_killed),
    ("a_daemon_killed_while_containerd_is_away", both_gone),
];

pub const BARE: crate::common::BareCases =
    &[("events_wait_for_containerd_in_order", events_wait), ("a_reader_that_comes_late_gets_everything", late_reader)];

const NAMESPACE: &str = "recovery";
const SIGTERM: u32 = 15;

/// A containerd of the case's own: should it stay down, the other cases do not notice.
fn with_own(version: &'static str, name: &str, case: impl FnOnce(&Containerd, &Client<'_>) -> Outcome) -> Outcome {
    let containerd = Containerd::start(version, &format!("{version}-{name}"))?;
    let outcome = case(&containerd, &containerd.namespace(NAMESPACE));
    let log = containerd.log_since(0);
    outcome.and_then(|()| containerd.close()).with_context(|| format!("its containerd:\n{log}"))
}

/// Stopped and killed in turn, with a new container each time it is back.
fn outlives(containerd: &Containerd) -> Outcome {
    with_own(containerd.version, "many", |own, client| {
        let logs = base::folder(&format!("logs-{}", containerd.version))?;
        let mut running = Vec::new();
        for kit in ["kit.wasm", "kit-component.wasm"] {
            let log = logs.join(kit);
            running.push((client.guest(&format!("/{kit}"), &["tick", "10"])?.logged(&log)?, log));
        }
        let daemon = client.daemon()?;
        for end in [Containerd::stop, Containerd::kill, Containerd::stop, Containerd::kill] {
            end(own)?;
            own.launch()?;
            for (container, log) in &running {
                container.wait_status("RUNNING")?;
                let before = ticks_in(log)?;
                wait::until_true("further output", SOON, || Ok(ticks_in(log)? > before + 3))?;
            }
            client.guest("/kit.wasm", &["exit", "3"])?.expect(3)?;
            ensure!(client.daemon()? == daemon);
        }
        for ((container, log), (signal, code)) in running.into_iter().zip([("SIGTERM", 143), ("SIGKILL", 137)]) {
            let (exit, _) = container.kill_and_wait(signal)?;
            ensure!(exit.exit_code() == code, "{exit:?}");
            container.wait_status("STOPPED")?;
            container.delete()?;
            complete(&log)?;
        }
        client.expect_empty()
    })
}

fn ticks_in(log: &Path) -> Result<usize> {
    Ok(fs::read_to_string(log).context("the log")?.lines().count())
}

/// Every tick from the first on.
fn complete(log: &Path) -> Outcome {
    for (index, line) in fs::read_to_string(log)?.lines().enumerate() {
        ensure!(line.starts_with(&format!("tick {} ", index + 1)), "line {} is {line:?}", index + 1);
    }
    Ok(())
}

/// containerd finds out by the connection, and runs `delete` for each of its containers.
fn daemon_killed(containerd: &Containerd) -> Outcome {
    with_own(containerd.version, "lost", |own, client| {
        let mut lost = Vec::new();
        for words in [["sleep", "0"], ["tick", "20"], ["spin", ""]] {
            lost.push(client.guest("/kit.wasm", &words)?.detached()?);
        }
        let watched = client.guest("/kit.wasm", &["sleep", "0"])?;
        let job = watched.spawn()?;
        let handle = watched.handle();
        handle.wait_status("RUNNING")?;
        let daemon = client.daemon()?;
        let sockets = proc::sockets(daemon)?;
        kill_process(daemon)?;
        let began = Instant::now();
        client.guest("/kit.wasm", &["exit", "5"])?.expect(5)?;
        ensure!(began.elapsed() < Duration::from_secs(5), "the next run took {:?}", began.elapsed());
        let replaced = client.daemon()?;
        ensure!(replaced != daemon && proc::sockets(replaced)? == sockets, "{sockets:?}");
        let done = job.wait(SOON)?;
        ensure!(done.code.is_some_and(|code| code != 0), "ctr run of a lost container ended with {done:?}");
        lost.push(handle);
        for container in &lost {
            ensure!(container.exit()?.exit_code() == 137, "{:?}", container.exit()?);
        }
        nothing_left(own, client, lost)
    })
}

fn both_gone(containerd: &Containerd) -> Outcome {
    with_own(containerd.version, "both", |own, client| {
        let lost = (0..3)
            .map(|_| client.guest("/kit-component.wasm", &["sleep", "0"])?.detached())
            .collect::<Result<Vec<_>>>()?;
        let daemon = client.daemon()?;
        own.kill()?;
        kill_process(daemon)?;
        own.launch()?;
        client.guest("/kit.wasm", &["exit", "5"])?.expect(5)?;
        nothing_left(own, client, lost)
    })
}

fn kill_process(pid: u32) -> Outcome {
    proc::signal(pid, Signal::KILL)?;
    wait::until_true("the process to end", SOON, || Ok(!proc::is_running(pid)))
}

/// The tasks are gone, their bundles too, and nothing is mounted; the containers can be removed.
fn nothing_left(own: &Containerd, client: &Client<'_>, lost: Vec<Container<'_>>) -> Outcome {
    wait::until_true("no task to be running", SOON, || {
        Ok(client.tasks()?.iter().all(|(_, status)| status == "STOPPED" || status == "UNKNOWN"))
    })?;
    // Dropped, each is removed with its task, should there be one.
    drop(lost);
    wait::until_true("nothing to be listed", SOON, || Ok(client.expect_empty().is_ok()))?;
    wait::until_true("no bundle to be left", SOON, || Ok(bundles(own)?.is_empty()))
        .with_context(|| format!("{:?}", bundles(own)))?;
    let mounts = proc::mounts_below(own.folder())?;
    ensure!(mounts.is_empty(), "{mounts:?}");
    Ok(())
}

fn bundles(own: &Containerd) -> Result<Vec<PathBuf>> {
    let folder = own.folder().join("state/io.containerd.runtime.v2.task").join(NAMESPACE);
    // Without one the folder goes as well.
    let Ok(entries) = fs::read_dir(folder) else { return Ok(Vec::new()) };
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// The clients of containerd open their ends of the FIFOs when they get to it; a guest may be gone before.
fn late_reader() -> Outcome {
    let shim = Shim::new("recovery-late")?;
    for (number, kit) in ["kit.wasm", "kit-component.wasm"].into_iter().enumerate() {
        let bundle = shim.bundle(&format!("late{number}"), &guests::built(kit)?, &["both", "10"])?;
        let streams = ["out", "err"].map(|name| bundle.folder.join(name));
        streams.iter().try_for_each(|path| shim::fifo(path))?;
        let task = shim.task(&bundle)?;
        task.create_with(|request| {
            [request.stdout, request.stderr] = streams.clone().map(|path| path.display().to_string());
        })?;
        task.start()?;
        std::thread::sleep(Duration::from_millis(300));
        let readers =
            streams.iter().map(|path| Ok(Collected::follow(File::open(path)?))).collect::<Result<Vec<_>>>()?;
        for (reader, word) in readers.iter().zip(["out", "err"]) {
            reader.wait_text(&format!("{word} 10\n"), SOON)?;
        }
        ensure!(task.wait()? == 0);
        task.delete()?;
    }
    shim.expect_end()
}

/// The lives of containers that came and went while nobody took events.
fn events_wait() -> Outcome {
    let mut shim = Shim::new("recovery-events")?;
    let kit = guests::built("kit.wasm")?;
    let task = shim.running("before", &kit, &["sleep", "0"])?;
    shim.events.wait("before", "start")?;
    let endpoint = shim.folder().join("c.sock.ttrpc");
    shim.events.close();
    fs::remove_file(&endpoint).context("the endpoint")?;
    task.kill(SIGTERM)?;
    ensure!(task.wait()? == 143);
    for number in 0..20_u32 {
        let ends = shim.running(&format!("n{number}"), &kit, &["exit", &number.to_string()])?;
        ensure!(ends.wait()? == number);
        ends.delete()?;
    }
    task.delete()?;
    shim.events = Recorder::listen(&endpoint)?;
    shim.events.expect_life("before", &["exit", "delete"])?;
    ensure!(shim.events.of("before")[0].code == Some(143));
    for number in 0..20_u32 {
        let id = format!("n{number}");
        shim.events.expect_life(&id, &["create", "start", "exit", "delete"])?;
        ensure!(shim.events.wait(&id, "exit")?.code == Some(number));
    }
    drop(task);
    shim.expect_end()
}
