//! How a daemon is stopped by a signal: in order, at once, and out of the way of the one that follows it.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use crate::common::containerd::Containerd;
use crate::common::shim::{self, Shim, Task};
use crate::common::{Outcome, SOON, guests, proc, wait};

pub const CASES: crate::common::Cases = &[("who_watches_a_container_of_a_stopped_daemon_is_told_its_code", watched)];

pub const BARE: crate::common::BareCases = &[
    ("a_stopped_daemon_leaves_nothing", stopped),
    ("a_second_signal_does_no_harm", second_signal),
    ("no_guest_delays_the_end", not_delayed),
    ("a_start_during_the_shutdown_gets_a_fresh_daemon", start_meanwhile),
    ("an_idle_daemon_stops_at_once", idle),
];

/// A daemon that is told to stop has nothing to wait for but a second for containerd to delete: guests have no handlers.
const PROMPT: Duration = Duration::from_secs(3);
const SIGTERM: u32 = 15;

/// `ctr run` in the foreground waits for the exit and then deletes the task: both have to be answered.
fn watched(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("watched");
    for signal in [Signal::TERM, Signal::INT] {
        let runs = [["tick", "20"], ["sleep", "0"], ["spin", ""]].map(|words| client.guest("/kit.wasm", &words));
        let runs = runs.into_iter().collect::<Result<Vec<_>>>()?;
        let jobs = runs.iter().map(|run| run.spawn()).collect::<Result<Vec<_>>>()?;
        // Kept to the end: a handle that goes out of scope removes its container.
        let handles: Vec<_> = runs.iter().map(|run| run.handle()).collect();
        handles.iter().try_for_each(|handle| handle.wait_status("RUNNING"))?;
        let daemon = client.daemon()?;
        end(daemon, signal)?;
        for job in jobs {
            let done = job.wait(SOON)?;
            ensure!(done.code == Some(143), "{signal:?}: ctr run ended with {done:?}");
        }
        drop(handles);
        client.guest("/kit.wasm", &["exit", "5"])?.expect(5)?;
        client.expect_empty()?;
    }
    Ok(())
}

/// A shim of the case's own.
fn fresh(name: &str) -> Result<Shim> {
    Shim::new(&format!("shutdown-{name}"))
}

fn kit(shim: &Shim, id: &str, words: &[&str]) -> Result<Task> {
    shim.running(id, &guests::built("kit.wasm")?, words)
}

/// Sends the signal and waits for the process to end; tells how long that took.
fn end(daemon: u32, signal: Signal) -> Result<Duration> {
    let began = Instant::now();
    proc::signal(daemon, signal)?;
    wait::until_true("the daemon to end", SOON, || Ok(!proc::is_running(daemon)))?;
    Ok(began.elapsed())
}

/// Every `Wait` is answered and every exit published before the process goes, and no file of it stays.
fn stopped() -> Outcome {
    for (name, signal) in [("term", Signal::TERM), ("int", Signal::INT)] {
        let shim = fresh(name)?;
        let tasks = [kit(&shim, "a", &["sleep", "0"])?, kit(&shim, "b", &["spin"])?];
        let created = shim.task(&shim.bundle("c", &guests::built("kit.wasm")?, &["exit", "0"])?)?;
        created.create()?;
        let exited = kit(&shim, "d", &["exit", "7"])?;
        ensure!(exited.wait()? == 7);
        let daemon = shim.daemon()?;
        let sockets = proc::sockets(daemon)?;
        let (took, waits) = thread::scope(|scope| {
            let waits: Vec<_> = tasks.iter().map(|task| scope.spawn(|| task.wait())).collect();
            thread::sleep(Duration::from_millis(100));
            let took = end(daemon, signal);
            (took, waits.into_iter().map(|wait| wait.join()).collect::<Vec<_>>())
        });
        let took = took?;
        ensure!(waits.iter().all(|wait| matches!(wait, Ok(Ok(143)))), "Wait answered {waits:?}");
        ensure!(took < PROMPT, "{signal:?} took {took:?}");
        for (id, code) in [("a", 143), ("b", 143), ("c", 143), ("d", 7)] {
            ensure!(shim.events.wait(id, "exit")?.code == Some(code), "{:?}", shim.events.of(id));
        }
        ensure!(!sockets.is_empty() && sockets.iter().all(|socket| !socket.exists()), "left {sockets:?}");
        shim.expect_end()?;
    }
    Ok(())
}

fn second_signal() -> Outcome {
    let shim = fresh("second")?;
    let _tasks = (0..10).map(|number| kit(&shim, &format!("s{number}"), &["spin"])).collect::<Result<Vec<_>>>()?;
    let daemon = shim.daemon()?;
    proc::signal(daemon, Signal::TERM)?;
    // It may be gone before it gets these.
    let _ = proc::signal(daemon, Signal::INT);
    let _ = proc::signal(daemon, Signal::TERM);
    wait::until_true("the daemon to end", SOON, || Ok(!proc::is_running(daemon)))?;
    for number in 0..10 {
        let code = shim.events.wait(&format!("s{number}"), "exit")?.code;
        ensure!(code == Some(143) || code == Some(137), "{code:?}");
    }
    shim.expect_end()
}

/// A spinner, one whose output nobody reads, one that asks for input that never comes.
fn not_delayed() -> Outcome {
    let shim = fresh("delay")?;
    let mut tasks = vec![kit(&shim, "spin", &["spin"])?];
    for (id, words) in [("write", ["write", "1073741824"]), ("cat", ["cat", ""])] {
        let bundle = shim.bundle(id, &guests::built("kit.wasm")?, &words)?;
        let (stdin, stdout) = (pipe(&bundle.folder, "in")?, pipe(&bundle.folder, "out")?);
        let task = shim.task(&bundle)?;
        task.create_with(|request| {
            request.stdin = stdin;
            request.stdout = stdout;
        })?;
        task.start()?;
        tasks.push(task);
    }
    thread::sleep(Duration::from_millis(300));
    let took = end(shim.daemon()?, Signal::TERM)?;
    ensure!(took < PROMPT, "it took {took:?}");
    for id in ["spin", "write", "cat"] {
        ensure!(shim.events.wait(id, "exit")?.code == Some(143), "{id}: {:?}", shim.events.of(id));
    }
    shim.expect_end()
}

fn pipe(folder: &Path, name: &str) -> Result<String> {
    let path = folder.join(name);
    shim::fifo(&path)?;
    Ok(path.display().to_string())
}

/// A containerd that takes no events holds a daemon up for some seconds; nobody has to wait for it.
fn start_meanwhile() -> Outcome {
    let mut shim = fresh("fresh")?;
    let old = kit(&shim, "old", &["sleep", "0"])?;
    shim.events.wait("old", "start")?;
    let daemon = shim.daemon()?;
    let [socket] = &proc::sockets(daemon)?[..] else { anyhow::bail!("not one socket") };
    shim.events.close();
    fs::remove_file(shim.folder().join("c.sock.ttrpc")).context("the endpoint")?;
    proc::signal(daemon, Signal::TERM)?;
    wait::until_true("the socket to go", SOON, || Ok(!socket.exists()))?;
    ensure!(proc::is_running(daemon), "it should be waiting for containerd to take its events");
    // Who is still connected hears what became of it, and gets nothing new.
    ensure!(old.create().is_err() && old.kill(SIGTERM).is_err());
    let new = kit(&shim, "new", &["exit", "6"])?;
    ensure!(new.wait()? == 6);
    let fresh = shim.daemons().into_iter().find(|pid| *pid != daemon).context("no fresh daemon")?;
    wait::until_true("the old daemon to end", SOON, || Ok(!proc::is_running(daemon)))?;
    ensure!(proc::is_running(fresh) && socket.exists(), "the old daemon took the new one's socket with it");
    new.delete().map(drop).context("Delete")?;
    let took = end(fresh, Signal::INT)?;
    ensure!(took < Duration::from_secs(10), "events that nobody takes held it up for {took:?}");
    shim.expect_end()
}

fn idle() -> Outcome {
    for (name, signal) in [("idle1", Signal::TERM), ("idle2", Signal::INT)] {
        let shim = fresh(name)?;
        let bundle = shim.bundle("a", &guests::built("kit.wasm")?, &["exit", "0"])?;
        shim.start(&bundle)?;
        let took = end(shim.daemon()?, signal)?;
        ensure!(took < PROMPT, "{signal:?} took {took:?}");
        shim.expect_end()?;
        // The next start has no trouble with what it left.
        let task = shim.task(&bundle)?;
        task.create()?;
        task.start()?;
        ensure!(task.wait()? == 0);
        task.delete()?;
        end(shim.daemon()?, signal)?;
        shim.expect_end()?;
    }
    Ok(())
}
