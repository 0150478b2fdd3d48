//! The task API of native containers over bare ttrpc: what `ctr` does not show.

use std::fs::File;
use std::io::Write as _;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::ttrpc::Code;
use serde_json::{Value, json};

use crate::common::job::Collected;
use crate::common::shim::{self, Shim, Task, expect_code, short};
use crate::common::{Outcome, SOON, native, proc, wait};

pub const BARE: crate::common::BareCases = &[
    ("a_life_in_every_state", life),
    ("a_terminal_is_resized", terminal),
    ("an_update_changes_the_cgroup", update),
    ("kill_all_reaches_all", kill_all),
    ("an_exec_in_every_state", exec),
    ("an_exec_has_a_terminal_of_its_own", exec_terminal),
    ("what_is_wrong_is_named", wrong),
];

const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;

fn fresh(name: &str) -> Result<Shim> {
    Shim::new(&format!("native-{name}"))
}

/// What runc needs beyond the least.
fn spec(id: &str, line: &str) -> Value {
    let words = ["/bin/sh", "-c", line].map(str::to_owned);
    let mut spec = shim::spec(&words);
    spec["root"]["path"] = json!(native::busybox().unwrap_or_default());
    spec["mounts"] = json!([
        { "destination": "/proc", "type": "proc", "source": "proc" },
        { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"] },
        { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"] },
    ]);
    spec["linux"] = json!({
        "cgroupsPath": format!("/troupe-test-{}/{id}", std::process::id()),
        "namespaces": [{ "type": "mount" }, { "type": "pid" }, { "type": "uts" }, { "type": "ipc" }],
        "resources": { "memory": { "limit": 67_108_864 } },
    });
    spec
}

fn task(shim: &Shim, id: &str, line: &str) -> Result<Task> {
    shim.task(&shim.bundle_of(id, &spec(id, line))?)
}

/// Takes the cgroup's parent away, too, which runc made.
fn end(shim: Shim, task: Task) -> Outcome {
    drop(task);
    shim.expect_end()?;
    for controller in
        ["", "cpu", "cpuacct", "cpuset", "memory", "freezer", "devices", "blkio", "pids", "systemd", "unified"]
    {
        // Not there, or another case's still.
        let _ = std::fs::remove_dir(format!("/sys/fs/cgroup/{controller}/troupe-test-{}", std::process::id()));
    }
    Ok(())
}

fn life() -> Outcome {
    let shim = fresh("life")?;
    let task = task(&shim, "a", "exit 5")?;
    let pid = task.create()?.pid;
    ensure!(proc::is_running(pid), "{pid} is no process");
    ensure!(task.state()?.status.enum_value() == Ok(api::Status::CREATED));
    expect_code("pause before start", task.client().pause(short(), &pause("a")), Code::FAILED_PRECONDITION, "created")?;
    ensure!(task.start()?.pid == pid);
    expect_code("start twice", task.start(), Code::FAILED_PRECONDITION, "cannot start")?;
    ensure!(task.wait()? == 5);
    expect_code("kill after exit", task.kill(SIGKILL), Code::NOT_FOUND, "process already finished")?;
    let deleted = task.delete()?;
    ensure!((deleted.pid, deleted.exit_status) == (pid, 5), "{deleted:?}");
    ensure!(!proc::pids().contains(&pid), "a zombie is left");
    shim.events.expect_life("a", &["create", "start", "exit", "delete"])?;
    // Deleted before it ran.
    let bundle = shim.bundle_of("b", &spec("b", "exit 0"))?;
    let unstarted = shim.task(&bundle)?;
    let pid = unstarted.create()?.pid;
    ensure!(unstarted.delete()?.exit_status == 137 && !proc::is_running(pid));
    shim.events.expect_life("b", &["create", "exit", "delete"])?;
    // Killed before it ran.
    let killed = shim.task(&shim.bundle_of("c", &spec("c", "exit 0"))?)?;
    killed.create()?;
    killed.kill(SIGKILL)?;
    ensure!(killed.wait()? == 137 && killed.delete()?.exit_status == 137);
    drop((unstarted, killed));
    end(shim, task)
}

fn pause(id: &str) -> api::PauseRequest {
    api::PauseRequest { id: id.into(), ..Default::default() }
}

fn terminal() -> Outcome {
    let shim = fresh("tty")?;
    let mut spec = spec("a", "read x; stty size; read x; stty size; echo done; exit 3");
    spec["process"]["terminal"] = json!(true);
    let task = shim.task(&shim.bundle_of("a", &spec)?)?;
    let (stdin, stdout) = (task.folder.join("stdin"), task.folder.join("stdout"));
    shim::fifo(&stdin)?;
    shim::fifo(&stdout)?;
    let output = Collected::follow(File::options().read(true).write(true).open(&stdout)?);
    task.create_with(|request| {
        request.stdin = stdin.display().to_string();
        request.stdout = stdout.display().to_string();
        request.terminal = true;
    })?;
    task.start()?;
    let mut input = File::options().write(true).open(&stdin)?;
    for (width, height) in [(80, 24), (132, 50)] {
        let size = api::ResizePtyRequest { id: "a".into(), width, height, ..Default::default() };
        task.client().resize_pty(short(), &size)?;
        input.write_all(b"\n")?;
        output.wait_text(&format!("{height} {width}"), SOON)?;
    }
    output.wait_text("done\r\n", SOON)?;
    ensure!(task.wait()? == 3);
    task.delete()?;
    end(shim, task)
}

fn update() -> Outcome {
    let shim = fresh("update")?;
    let task = task(&shim, "a", "sleep 1000")?;
    task.create()?;
    task.start()?;
    ensure!(memory_limit(&task)? == 67_108_864);
    let update = |value: &str| {
        let resources = Any { value: value.into(), ..Default::default() };
        let request =
            api::UpdateTaskRequest { id: "a".into(), resources: MessageField::some(resources), ..Default::default() };
        task.client().update(short(), &request).map(drop)
    };
    update(r#"{"memory":{"limit":33554432}}"#)?;
    ensure!(memory_limit(&task)? == 33_554_432);
    expect_code("an update that is none", update("{"), Code::INVALID_ARGUMENT, "the resources")?;
    let no_terminal = api::ResizePtyRequest { id: "a".into(), width: 1, height: 1, ..Default::default() };
    let refused = task.client().resize_pty(short(), &no_terminal);
    expect_code("a resize without a terminal", refused, Code::INVALID_ARGUMENT, "no terminal")?;
    task.kill(SIGKILL)?;
    ensure!(task.wait()? == 137);
    task.delete()?;
    end(shim, task)
}

fn memory_limit(task: &Task) -> Result<u64> {
    let request = api::StatsRequest { id: task.id.clone(), ..Default::default() };
    let stats = task.client().stats(short(), &request)?.stats.into_option().context("no stats")?;
    match stats.type_url.as_str() {
        "io.containerd.cgroups.v1.Metrics" => Ok(v1::Metrics::parse_from_bytes(&stats.value)?.memory.usage.limit),
        _ => Ok(v2::Metrics::parse_from_bytes(&stats.value)?.memory.usage_limit),
    }
}

fn kill_all() -> Outcome {
    let shim = fresh("all")?;
    let line = "sh -c 'trap \"exit 0\" TERM; while :; do sleep 0.1; done' & trap '' TERM; wait; exit 4";
    let task = task(&shim, "a", line)?;
    task.create()?;
    task.start()?;
    crate::common::wait::until_true("both shells", SOON, || {
        let request = api::PidsRequest { id: "a".into(), ..Default::default() };
        Ok(task.client().pids(short(), &request)?.processes.len() >= 2)
    })?;
    let all = api::KillRequest { id: "a".into(), signal: SIGTERM, all: true, ..Default::default() };
    // The inner one handles it, and so the outer one has nothing to wait for; it may not have got to its trap yet.
    crate::common::wait::until_true("the end", SOON, || {
        let _ = task.client().kill(short(), &all);
        Ok(task.state()?.status.enum_value() == Ok(api::Status::STOPPED))
    })?;
    ensure!(task.wait()? == 4);
    task.delete()?;
    end(shim, task)
}

fn process(line: &str) -> MessageField<Any> {
    let process =
        json!({ "args": ["/bin/sh", "-c", line], "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 } });
    MessageField::some(Any { value: process.to_string().into_bytes(), ..Default::default() })
}

fn exec() -> Outcome {
    let shim = fresh("exec")?;
    let task = task(&shim, "a", "sleep 1000")?;
    let client = task.client();
    task.create()?;
    let request = |line: &str| api::ExecProcessRequest {
        id: "a".into(),
        exec_id: "e".into(),
        spec: process(line),
        ..Default::default()
    };
    // In one that is created there are its namespaces, and nothing else.
    client.exec(short(), &request("exec sleep 1000"))?;
    expect_code("the same id", client.exec(short(), &request("exit 1")), Code::ALREADY_EXISTS, "exec e")?;
    let state = api::StateRequest { id: "a".into(), exec_id: "e".into(), ..Default::default() };
    let start = api::StartRequest { id: "a".into(), exec_id: "e".into(), ..Default::default() };
    let kill = api::KillRequest { id: "a".into(), exec_id: "e".into(), signal: SIGKILL, ..Default::default() };
    let delete = api::DeleteRequest { id: "a".into(), exec_id: "e".into(), ..Default::default() };
    let wait = api::WaitRequest { id: "a".into(), exec_id: "e".into(), ..Default::default() };
    ensure!(client.state(short(), &state)?.status.enum_value() == Ok(api::Status::CREATED));
    expect_code("kill before start", client.kill(short(), &kill), Code::FAILED_PRECONDITION, "cannot kill")?;
    let pid = client.start(short(), &start)?.pid;
    expect_code("start twice", client.start(short(), &start), Code::FAILED_PRECONDITION, "cannot start")?;
    let seen = client.state(short(), &state)?;
    ensure!(seen.status.enum_value() == Ok(api::Status::RUNNING) && seen.pid == pid && seen.id == "e", "{seen:?}");
    expect_code("delete while it runs", client.delete(short(), &delete), Code::FAILED_PRECONDITION, "running")?;
    task.start()?;
    client.kill(short(), &kill)?;
    ensure!(client.wait(short(), &wait)?.exit_status == 137);
    expect_code("kill after exit", client.kill(short(), &kill), Code::NOT_FOUND, "already finished")?;
    let deleted = client.delete(short(), &delete)?;
    ensure!((deleted.pid, deleted.exit_status) == (pid, 137) && !proc::pids().contains(&pid), "{deleted:?}");
    expect_code("delete twice", client.delete(short(), &delete), Code::NOT_FOUND, "exec e")?;
    // One that cannot start can be deleted.
    let mut none = request("");
    none.spec.as_mut().context("a spec")?.value = br#"{"args":["/none"],"cwd":"/","user":{"uid":0,"gid":0}}"#.to_vec();
    client.exec(short(), &none)?;
    expect_code("an exec of nothing", client.start(short(), &start), Code::UNKNOWN, "/none")?;
    client.delete(short(), &delete)?;
    task.kill(SIGKILL)?;
    ensure!(task.wait()? == 137);
    expect_code("exec after exit", client.exec(short(), &request("exit 1")), Code::FAILED_PRECONDITION, "stopped")?;
    task.delete()?;
    // One that was never started takes along what was executed in it.
    task.create()?;
    client.exec(short(), &request("exec sleep 1000"))?;
    let pid = client.start(short(), &start)?.pid;
    task.delete()?;
    wait::until_true("the process to end", SOON, || Ok(!proc::is_running(pid)))?;
    end(shim, task)
}

fn exec_terminal() -> Outcome {
    let shim = fresh("exec-tty")?;
    let task = task(&shim, "a", "sleep 1000")?;
    task.create()?;
    task.start()?;
    let stdout = task.folder.join("e-stdout");
    shim::fifo(&stdout)?;
    let output = Collected::follow(File::options().read(true).write(true).open(&stdout)?);
    // Twice: nothing of the first is in the way of the second.
    for _ in 0..2 {
        let request = api::ExecProcessRequest {
            id: "a".into(),
            exec_id: "e".into(),
            terminal: true,
            stdout: stdout.display().to_string(),
            spec: process("tty; exit 7"),
            ..Default::default()
        };
        task.client().exec(short(), &request)?;
        let start = api::StartRequest { id: "a".into(), exec_id: "e".into(), ..Default::default() };
        task.client().start(short(), &start)?;
        let wait = api::WaitRequest { id: "a".into(), exec_id: "e".into(), ..Default::default() };
        ensure!(task.client().wait(short(), &wait)?.exit_status == 7);
        output.wait_text("/dev/pts/0\r\n", SOON)?;
        let delete = api::DeleteRequest { id: "a".into(), exec_id: "e".into(), ..Default::default() };
        task.client().delete(short(), &delete)?;
    }
    task.kill(SIGKILL)?;
    ensure!(task.wait()? == 137);
    task.delete()?;
    end(shim, task)
}

fn wrong() -> Outcome {
    let shim = fresh("wrong")?;
    let task = task(&shim, "a", "exit 0")?;
    let mut program = spec("b", "exit 0");
    program["process"]["args"] = json!(["/bin/none"]);
    let missing = shim.task(&shim.bundle_of("b", &program)?)?;
    expect_code("a missing program", missing.create(), Code::UNKNOWN, "/bin/none: no such file")?;
    let mut namespace = spec("c", "exit 0");
    namespace["linux"]["namespaces"] = json!([{ "type": "mount" }, { "type": "network", "path": "/nonexistent/ns" }]);
    let lost = shim.task(&shim.bundle_of("c", &namespace)?)?;
    expect_code("a missing namespace", lost.create(), Code::UNKNOWN, "/nonexistent/ns")?;
    task.create()?;
    task.start()?;
    task.wait()?;
    task.delete()?;
    drop((missing, lost));
    end(shim, task)
}
