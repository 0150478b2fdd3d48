//! The task service itself, over bare ttrpc: what each verb answers in each state, and which events come in which order.

use std::fs::{self, File};
use std::io::Write;
use std::thread;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::ttrpc::{self, Code};

use crate::common::job::Collected;
use crate::common::shim::{self, Shim, Task, expect_code, short};
use crate::common::{Outcome, SOON, guests, proc};

pub const CASES: crate::common::BareCases = &[
    ("a_life_over_ttrpc", life),
    ("both_names_of_the_service_answer", service_names),
    ("create_twice_already_exists", create_twice),
    ("create_with_an_id_whose_container_was_deleted", create_again),
    ("start_twice_is_a_failed_precondition", start_twice),
    ("delete_while_running_is_a_failed_precondition", delete_running),
    ("delete_before_start", delete_created),
    ("kill_before_start", kill_created),
    ("kill_after_exit_is_not_found", kill_exited),
    ("wait_after_exit_answers_at_once", wait_exited),
    ("every_wait_is_answered", many_waits),
    ("an_unknown_id_is_not_found", unknown),
    ("what_is_not_there_yet_says_so", unimplemented),
    ("signals_that_do_not_exist_are_refused", wrong_signals),
    ("state_tells_the_status", states),
    ("connect_and_pids_tell_the_processes", processes),
    ("stats_tell_cpu_and_memory", stats),
    ("events_come_in_order", events),
    ("a_missing_bundle_is_an_error", no_bundle),
    ("closing_stdin_ends_it", close_io),
    ("shutdown_with_containers_changes_nothing", early_shutdown),
];

const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;

/// A shim of its own for a case, so that its log and its events are the case's only.
fn fresh(name: &str) -> Result<Shim> {
    Shim::new(&format!("api-{name}"))
}

fn kit(shim: &Shim, id: &str, words: &[&str]) -> Result<Task> {
    shim.running(id, &guests::built("kit.wasm")?, words)
}

/// A created one.
fn created(shim: &Shim, id: &str, words: &[&str]) -> Result<Task> {
    let task = shim.task(&shim.bundle(id, &guests::built("kit.wasm")?, words)?)?;
    task.create()?;
    Ok(task)
}

fn life() -> Outcome {
    let shim = fresh("life")?;
    let task = shim.task(&shim.bundle("a", &guests::built("kit.wasm")?, &["exit", "5"])?)?;
    let pid = task.create()?.pid;
    ensure!(pid > 1, "pid {pid}");
    ensure!(task.start()?.pid == pid);
    ensure!(task.wait()? == 5);
    let deleted = task.delete()?;
    ensure!((deleted.pid, deleted.exit_status) == (pid, 5) && deleted.exited_at.is_some(), "{deleted:?}");
    expect_code("state after delete", task.state(), Code::NOT_FOUND, "a")?;
    task.shutdown()?;
    // An open connection may be about to create a container, and so the daemon waits for it.
    drop(task);
    shim.expect_end()
}

/// containerd 1.x asks `containerd.task.v2.Task`; the generated client only knows v3.
fn service_names() -> Outcome {
    let shim = fresh("names")?;
    let bundle = shim.bundle("a", &guests::built("kit.wasm")?, &["sleep", "0"])?;
    let address = shim::address(&shim.start(&bundle)?)?;
    let task = Task::connect(&address, &bundle)?;
    task.create()?;
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let response: api::StateResponse = shim::call(&address, service, "State", &state_request("a"))?;
        ensure!(response.id == "a", "{service}: {response:?}");
    }
    task.delete()?;
    Ok(())
}

fn state_request(id: &str) -> api::StateRequest {
    api::StateRequest { id: id.to_owned(), ..Default::default() }
}

fn create_twice() -> Outcome {
    let shim = fresh("twice")?;
    let task = created(&shim, "a", &["sleep", "0"])?;
    expect_code("second Create", task.create(), Code::ALREADY_EXISTS, "a")?;
    task.start()?;
    expect_code("Create of a running one", task.create(), Code::ALREADY_EXISTS, "a")?;
    task.kill(SIGKILL)?;
    ensure!(task.wait()? == 137);
    expect_code("Create of a stopped one", task.create(), Code::ALREADY_EXISTS, "a")?;
    task.delete().map(drop).context("Delete")
}

fn create_again() -> Outcome {
    let shim = fresh("again")?;
    for code in [3, 4, 5] {
        let task = shim.task(&shim.bundle("a", &guests::built("kit.wasm")?, &["exit", &code.to_string()])?)?;
        task.create()?;
        task.start()?;
        ensure!(task.wait()? == code);
        task.delete()?;
    }
    Ok(())
}

fn start_twice() -> Outcome {
    let shim = fresh("start2")?;
    let task = kit(&shim, "a", &["sleep", "0"])?;
    expect_code("second Start", task.start(), Code::FAILED_PRECONDITION, "a")?;
    task.kill(SIGKILL)?;
    task.wait()?;
    expect_code("Start of a stopped one", task.start(), Code::FAILED_PRECONDITION, "a")?;
    task.delete().map(drop).context("Delete")
}

fn delete_running() -> Outcome {
    let shim = fresh("delete")?;
    let task = kit(&shim, "a", &["spin"])?;
    expect_code("Delete", task.delete(), Code::FAILED_PRECONDITION, "running")?;
    ensure!(task.state()?.status.enum_value() == Ok(api::Status::RUNNING), "Delete ended it");
    task.kill(SIGKILL)?;
    task.wait()?;
    task.delete().map(drop).context("Delete after the exit")
}

fn delete_created() -> Outcome {
    let shim = fresh("delete0")?;
    let task = created(&shim, "a", &["exit", "0"])?;
    task.delete()?;
    expect_code("state", task.state(), Code::NOT_FOUND, "a")?;
    drop(task);
    shim.expect_end()
}

fn kill_created() -> Outcome {
    let shim = fresh("kill0")?;
    for (signal, code) in [(SIGKILL, 137), (SIGTERM, 143)] {
        let task = created(&shim, &format!("a{signal}"), &["exit", "0"])?;
        task.kill(signal)?;
        ensure!(task.wait()? == code);
        expect_code("Start of a killed one", task.start(), Code::FAILED_PRECONDITION, "")?;
        task.delete()?;
    }
    Ok(())
}

fn kill_exited() -> Outcome {
    let shim = fresh("kill1")?;
    let task = kit(&shim, "a", &["exit", "3"])?;
    task.wait()?;
    for signal in [SIGKILL, SIGTERM] {
        expect_code("Kill", task.kill(signal), Code::NOT_FOUND, "process already finished")?;
    }
    ensure!(task.delete()?.exit_status == 3);
    Ok(())
}

fn wait_exited() -> Outcome {
    let shim = fresh("wait")?;
    let task = kit(&shim, "a", &["exit", "6"])?;
    shim.events.wait("a", "exit")?;
    for _ in 0..3 {
        ensure!(task.wait()? == 6);
    }
    task.delete()?;
    expect_code("Wait after Delete", task.wait(), Code::NOT_FOUND, "a")
}

fn many_waits() -> Outcome {
    let shim = fresh("waits")?;
    let task = kit(&shim, "a", &["sleep", "0"])?;
    let codes = thread::scope(|scope| {
        let waits: Vec<_> = (0..20).map(|_| scope.spawn(|| task.wait())).collect();
        // One wait on another connection goes with it, as that of a restarted containerd does.
        let killed = task.kill(SIGTERM);
        let codes: Vec<_> = waits.into_iter().map(|wait| wait.join()).collect();
        killed.map(|()| codes)
    })?;
    ensure!(codes.iter().all(|code| matches!(code, Ok(Ok(143)))), "{codes:?}");
    task.delete().map(drop).context("Delete")
}

fn unknown() -> Outcome {
    let shim = fresh("unknown")?;
    let mut task = kit(&shim, "a", &["sleep", "0"])?;
    let known = std::mem::replace(&mut task.id, "nobody".into());
    expect_code("State", task.state(), Code::NOT_FOUND, "nobody")?;
    expect_code("Start", task.start(), Code::NOT_FOUND, "nobody")?;
    expect_code("Wait", task.wait(), Code::NOT_FOUND, "nobody")?;
    expect_code("Kill", task.kill(SIGKILL), Code::NOT_FOUND, "nobody")?;
    expect_code("Delete", task.delete(), Code::NOT_FOUND, "nobody")?;
    let client = task.client();
    let id = || "nobody".to_owned();
    let pids = client.pids(short(), &api::PidsRequest { id: id(), ..Default::default() });
    expect_code("Pids", pids, Code::NOT_FOUND, "nobody")?;
    let stats = client.stats(short(), &api::StatsRequest { id: id(), ..Default::default() });
    expect_code("Stats", stats, Code::NOT_FOUND, "nobody")?;
    let close = client.close_io(short(), &api::CloseIORequest { id: id(), stdin: true, ..Default::default() });
    expect_code("CloseIO", close, Code::NOT_FOUND, "nobody")?;
    task.id = known;
    // A process of the container that was never executed is as unknown as a container.
    let exec = api::WaitRequest { id: "a".into(), exec_id: "e".into(), ..Default::default() };
    expect_code("Wait of an exec", task.client().wait(short(), &exec), Code::NOT_FOUND, "e")?;
    end(task)
}

fn end(task: Task) -> Outcome {
    task.kill(SIGKILL)?;
    task.wait()?;
    task.delete().map(drop).context("Delete")
}

fn unimplemented() -> Outcome {
    let shim = fresh("later")?;
    let task = kit(&shim, "a", &["sleep", "0"])?;
    let client = task.client();
    let id = || "a".to_owned();
    let sentence = |what: &str, result: ttrpc::Result<()>| match result {
        Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::UNIMPLEMENTED => {
            ensure!(status.message.split(' ').count() > 2, "{what} says only {:?}", status.message);
            Ok(())
        }
        other => anyhow::bail!("{what}: {other:?}"),
    };
    let exec = api::ExecProcessRequest { id: id(), exec_id: "e".into(), ..Default::default() };
    sentence("Exec", client.exec(short(), &exec).map(drop))?;
    sentence("Pause", client.pause(short(), &api::PauseRequest { id: id(), ..Default::default() }).map(drop))?;
    sentence("Resume", client.resume(short(), &api::ResumeRequest { id: id(), ..Default::default() }).map(drop))?;
    let resize = api::ResizePtyRequest { id: id(), ..Default::default() };
    sentence("ResizePty", client.resize_pty(short(), &resize).map(drop))?;
    let checkpoint = api::CheckpointTaskRequest { id: id(), ..Default::default() };
    sentence("Checkpoint", client.checkpoint(short(), &checkpoint).map(drop))?;
    end(task)
}

fn wrong_signals() -> Outcome {
    let shim = fresh("signals")?;
    let task = kit(&shim, "a", &["sleep", "0"])?;
    for signal in [65, 1000, u32::MAX] {
        expect_code("Kill", task.kill(signal), Code::INVALID_ARGUMENT, &signal.to_string())?;
    }
    ensure!(task.state()?.status.enum_value() == Ok(api::Status::RUNNING));
    end(task)
}

fn states() -> Outcome {
    let shim = fresh("state")?;
    let task = created(&shim, "a", &["sleep", "0"])?;
    let status = || anyhow::Ok(task.state()?.status.enum_value_or_default());
    ensure!(status()? == api::Status::CREATED);
    task.start()?;
    ensure!(status()? == api::Status::RUNNING);
    task.kill(SIGKILL)?;
    task.wait()?;
    let state = task.state()?;
    ensure!(state.status.enum_value() == Ok(api::Status::STOPPED) && state.exit_status == 137, "{state:?}");
    ensure!(state.exited_at.is_some() && state.bundle == task.folder.display().to_string(), "{state:?}");
    task.delete().map(drop).context("Delete")
}

fn processes() -> Outcome {
    let shim = fresh("pids")?;
    let task = kit(&shim, "a", &["sleep", "0"])?;
    let daemon = shim.daemon()?;
    let connect = task.client().connect(short(), &api::ConnectRequest { id: "a".into(), ..Default::default() })?;
    ensure!(connect.shim_pid == daemon, "{connect:?} of {daemon}");
    ensure!(connect.task_pid == task.state()?.pid && connect.task_pid != daemon, "{connect:?}");
    // The task's pid is that of a thread of the daemon: what containerd joins is the container's network.
    ensure!(std::path::Path::new(&format!("/proc/{daemon}/task/{}", connect.task_pid)).exists(), "{connect:?}");
    let pids = task.client().pids(short(), &api::PidsRequest { id: "a".into(), ..Default::default() })?;
    ensure!(pids.processes.iter().any(|process| process.pid == connect.task_pid), "{pids:?}");
    end(task)
}

fn stats() -> Outcome {
    let shim = fresh("stats")?;
    let task = kit(&shim, "a", &["burn", "300"])?;
    task.wait()?;
    let stats = task.client().stats(short(), &api::StatsRequest { id: "a".into(), ..Default::default() })?;
    let metrics = stats.stats.into_option().context("no stats")?;
    ensure!(metrics.type_url.starts_with("io.containerd.cgroups."), "{}", metrics.type_url);
    ensure!(!metrics.value.is_empty(), "empty metrics");
    task.delete().map(drop).context("Delete")
}

fn events() -> Outcome {
    let shim = fresh("events")?;
    for number in 0..10 {
        let id = format!("e{number}");
        let task = kit(&shim, &id, &["exit", &number.to_string()])?;
        ensure!(task.wait()? == number);
        task.delete()?;
        shim.events.expect_life(&id, &["create", "start", "exit", "delete"])?;
        ensure!(shim.events.wait(&id, "exit")?.code == Some(number));
    }
    Ok(())
}

fn no_bundle() -> Outcome {
    let shim = fresh("bundle")?;
    let bundle = shim.bundle("a", &guests::built("kit.wasm")?, &["exit", "0"])?;
    let task = shim.task(&bundle)?;
    let gone = task.create_with(|request| request.bundle = "/no/such/bundle".into());
    expect_code("Create", gone, Code::INVALID_ARGUMENT, "/no/such/bundle")?;
    task.create().map(drop).context("the id must be free again")?;
    task.delete().map(drop).context("Delete")
}

fn close_io() -> Outcome {
    let shim = fresh("closeio")?;
    let bundle = shim.bundle("a", &guests::built("kit.wasm")?, &["cat"])?;
    let (stdin, stdout) = (bundle.folder.join("in"), bundle.folder.join("out"));
    shim::fifo(&stdin)?;
    shim::fifo(&stdout)?;
    let output = Collected::follow(File::options().read(true).write(true).open(&stdout)?);
    let task = shim.task(&bundle)?;
    task.create_with(|request| {
        request.stdin = stdin.display().to_string();
        request.stdout = stdout.display().to_string();
    })?;
    task.start()?;
    // A client that goes away is not the end of stdin: another may come. CloseIO is, once the client has closed too.
    for word in ["one ", "two "] {
        let mut client = File::options().write(true).open(&stdin)?;
        client.write_all(word.as_bytes())?;
        output.wait_text(word, SOON)?;
    }
    ensure!(task.state()?.status.enum_value() == Ok(api::Status::RUNNING));
    let close = api::CloseIORequest { id: "a".into(), stdin: true, ..Default::default() };
    task.client().close_io(short(), &close)?;
    ensure!(task.wait()? == 0);
    ensure!(output.text_so_far() == "one two ");
    task.delete()?;
    fs::remove_file(stdin).context("the FIFO belongs to containerd, it should still be there")
}

fn early_shutdown() -> Outcome {
    let shim = fresh("shutdown")?;
    let task = kit(&shim, "a", &["sleep", "0"])?;
    let daemon = shim.daemon()?;
    task.shutdown()?;
    ensure!(task.state()?.status.enum_value() == Ok(api::Status::RUNNING) && proc::is_running(daemon));
    end(task)?;
    shim.expect_end()
}
