//! Linux programs run through runc, in the same process as the wasm ones.

use std::time::{Duration, Instant};

use anyhow::ensure;

use crate::common::containerd::Containerd;
use crate::common::job::Job;
use crate::common::native::{exec_in, run, shell};
use crate::common::{Outcome, SOON, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("codes_output_and_environment", codes),
    ("stdin_is_copied_and_ends", stdin),
    ("ten_mebibytes_are_complete_at_exit", large),
    ("a_signal_is_the_programs_to_handle", signals),
    ("a_script_is_run", script),
    ("what_is_neither_is_named", neither),
    ("runcs_errors_are_told_and_nothing_is_left", refused),
    ("a_missing_runc_is_a_package_to_install", missing),
    ("volumes_and_devices_are_runcs_business", volumes),
    ("exec_has_its_own_life", exec),
    ("exec_has_its_own_streams_and_signals", exec_streams),
    ("a_process_left_behind_by_an_exec_keeps_nobody", left_behind),
    ("pause_and_resume", pause),
    ("a_terminal_with_its_size", terminal),
    ("metrics_are_the_cgroups", metrics),
    ("ps_lists_all_processes", ps),
    ("out_of_memory_is_told", oom),
];

fn codes(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native");
    let line = "echo out; echo err >&2; echo $COLOUR; exit 7";
    let run = shell(&client, line)?.option("--env", "COLOUR=red");
    let done = run.expect(7)?;
    ensure!(done.text() == "out\nred\n" && done.stderr.contains("err\n"), "{done:?}");
    containerd
        .with_events(|events| events.expect_life(&client.namespace, &run.id, &["create", "start", "exit", "delete"]))?;
    for code in [0, 1, 126, 255] {
        shell(&client, &format!("exit {code}"))?.expect(code)?;
    }
    // Nothing of ours gets in, and the limit of descriptors is not the one we raised for ourselves.
    let text = shell(&client, "env; ulimit -Sn")?.expect(0)?.text();
    for own in ["TROUPE", "TTRPC_ADDRESS", "NOTIFY_SOCKET"] {
        ensure!(!text.contains(own), "the shim's own {own} reached the program: {text}");
    }
    let theirs = shell(&client, "ulimit -Sn")?.runtime(RUNC).expect(0)?.text();
    ensure!(text.ends_with(&format!("\n{theirs}")), "descriptors: {text} and with runc's own shim {theirs}");
    client.expect_empty()
}

pub const RUNC: &str = "io.containerd.runc.v2";

fn stdin(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native");
    let input: Vec<u8> = (0..3 << 20_u32).map(|index| (index * 7 % 251) as u8).collect();
    let mut job = run(&client, &["cat"])?.spawn()?;
    job.write(&input)?;
    let done = job.finish(SOON)?;
    ensure!(done.code == Some(0) && done.stdout == input, "{} of {} bytes", done.stdout.len(), input.len());
    let mut job = run(&client, &["cat"])?.spawn()?;
    for word in ["first\n", "second\n"] {
        job.write(word.as_bytes())?;
        job.stdout.wait_text(word, SOON)?;
    }
    ensure!(job.finish(SOON)?.code == Some(0));
    client.expect_empty()
}

fn large(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native");
    for _ in 0..3 {
        let done =
            shell(&client, "dd if=/dev/zero bs=65536 count=160 2>/dev/null | tr '\\0' x; echo end >&2")?.expect(0)?;
        ensure!(done.stdout.len() == 10 << 20 && done.stderr.contains("end"), "{} bytes", done.stdout.len());
    }
    Ok(())
}

fn signals(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native");
    let handles = "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let run = shell(&client, handles)?;
    let job = run.spawn()?;
    job.stdout.wait_text("ready", SOON)?;
    let container = run.handle();
    container.kill("SIGTERM")?;
    let done = job.wait(SOON)?;
    ensure!(done.code == Some(3) && done.text() == "ready\nbye\n", "{done:?}");
    let run = shell(&client, "echo ready; while :; do sleep 1; done")?;
    let job = run.spawn()?;
    job.stdout.wait_text("ready", SOON)?;
    let container = run.handle();
    let (exit, took) = container.kill_and_wait("SIGKILL")?;
    ensure!(exit.exit_code() == 137 && took < Duration::from_secs(5), "{exit:?} after {took:?}");
    ensure!(job.wait(SOON)?.code == Some(137));
    let container = shell(&client, "exit 0")?.detached()?;
    container.exit()?;
    let error = container.kill_error()?;
    ensure!(error.contains("process already finished") || error.contains("not found"), "{error}");
    container.delete()?;
    client.expect_empty()
}

fn script(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native");
    let done = run(&client, &["/script", "a", "b"])?.expect(6)?;
    ensure!(done.text() == "script a b\n", "{done:?}");
    Ok(())
}

fn neither(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native");
    run(&client, &["/text"])?.expect_error("/text: is a text file: neither WebAssembly")?;
    run(&client, &["/nothing"])?.expect_error("/nothing: no such file")?;
    client.expect_empty()
}

fn refused(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native");
    run(&client, &["/locked"])?.expect_error("permission denied")?;
    run(&client, &["true"])?.option("--with-ns", "network:/nonexistent/ns").expect_error("/nonexistent/ns")?;
    client.expect_empty()?;
    let state = containerd.folder().join("state/runc/native");
    let left = std::fs::read_dir(&state).map(|entries| entries.count()).unwrap_or(0);
    ensure!(left == 0, "{left} containers are left in {}", state.display());
    Ok(())
}

fn missing(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native-missing");
    let options = containerd.folder().join("no-runc.toml");
    std::fs::write(&options, containerd.default_options() + "BinaryName = \"/nonexistent/runc\"\n")?;
    let run = shell(&client, "exit 0")?.options(options);
    run.expect_error("/nonexistent/runc is not installed")?;
    run.expect_error("the package runc")?;
    client.expect_empty()
}

fn volumes(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native");
    let folder = containerd.folder().join("volume");
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("in"), "from the host")?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", folder.display());
    let line = "cat /data/in; echo back > /data/out; echo x > /dev/null; ls /dev/shm && exit 4";
    let done = shell(&client, line)?.option("--mount", &mount).expect(4)?;
    ensure!(done.text() == "from the host", "{done:?}");
    ensure!(std::fs::read_to_string(folder.join("out"))? == "back\n");
    std::fs::write(folder.join("run.sh"), "#!/bin/sh\nexit 9\n")?;
    rustix::fs::chmod(folder.join("run.sh"), rustix::fs::Mode::from_raw_mode(0o755))?;
    run(&client, &["/data/run.sh"])?.option("--mount", &mount).expect(9)?;
    Ok(())
}

fn exec(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native-exec");
    let container = shell(&client, "trap 'exit 0' TERM; while :; do sleep 0.1; done")?.detached()?;
    for (id, code) in [("e1", 0), ("e2", 5), ("e3", 255), ("e1", 3)] {
        let done =
            exec_in(&client, &container.id, id, &["sh", "-c", &format!("echo {id}; exit {code}")])?.finish(SOON)?;
        ensure!(done.code == Some(code) && done.text() == format!("{id}\n"), "{id}: {done:?}");
    }
    let failed = exec_in(&client, &container.id, "e4", &["/none"])?.finish(SOON)?;
    ensure!(failed.code != Some(0) && failed.stderr.contains("/none"), "{failed:?}");
    ensure!(container.status()?.as_deref() == Some("RUNNING"), "an exec ended the container");
    let events = containerd.with_events(|events| Ok(events.of(&client.namespace, &container.id)))?;
    let of_e2: Vec<&str> = events
        .iter()
        .filter(|event| event.body["exec_id"] == "e2" || event.body["id"] == "e2")
        .map(|event| event.verb.as_str())
        .collect();
    ensure!(of_e2 == ["exec-added", "exec-started", "exit"], "{of_e2:?} of {events:?}");
    // Those that run when the container ends are told before its own end.
    let sleeper = exec_in(&client, &container.id, "late", &["sh", "-c", "echo on; sleep 1000"])?;
    sleeper.stdout.wait_text("on", SOON)?;
    container.kill("SIGTERM")?;
    wait::until_true("the container's own exit", SOON, || {
        containerd.with_events(|events| {
            Ok(events
                .of(&client.namespace, &container.id)
                .iter()
                .any(|event| event.body["id"] == container.id.as_str()))
        })
    })?;
    let exits = containerd.with_events(|events| Ok(events.of(&client.namespace, &container.id)))?;
    let ids: Vec<String> =
        exits.iter().filter(|event| event.verb == "exit").map(|event| event.body["id"].to_string()).collect();
    ensure!(ids[ids.len() - 2..] == ["\"late\"".to_owned(), format!("\"{}\"", container.id)], "{ids:?}");
    ensure!(sleeper.wait(SOON)?.code == Some(137));
    container.delete()?;
    client.expect_empty()
}

fn exec_streams(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native-exec");
    let container = run(&client, &["sleep", "1000"])?.detached()?;
    let mut cat = exec_in(&client, &container.id, "cat", &["sh", "-c", "cat; echo err >&2"])?;
    cat.write(b"through the exec\n")?;
    cat.stdout.wait_text("through the exec", SOON)?;
    let done = cat.finish(SOON)?;
    ensure!(done.code == Some(0) && done.stderr.contains("err"), "{done:?}");
    let trap = "trap 'exit 8' TERM; echo on; while :; do sleep 0.1; done";
    let trapped = exec_in(&client, &container.id, "trap", &["sh", "-c", trap])?;
    trapped.stdout.wait_text("on", SOON)?;
    client.ctr(&["task", "kill", "--signal", "SIGTERM", "--exec-id", "trap", &container.id])?;
    ensure!(trapped.wait(SOON)?.code == Some(8));
    // The first exit that is seen is an exec's.
    container.kill("SIGKILL")?;
    container.wait_status("STOPPED")?;
    container.delete()?;
    client.expect_empty()
}

fn left_behind(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native-exec");
    let container = run(&client, &["sleep", "1000"])?.detached()?;
    let begin = Instant::now();
    let done = exec_in(&client, &container.id, "bg", &["sh", "-c", "sleep 500 & echo started"])?.finish(SOON)?;
    ensure!(done.code == Some(0) && done.text() == "started\n", "{done:?}");
    ensure!(begin.elapsed() < Duration::from_secs(20), "it took {:?}", begin.elapsed());
    ensure!(container.ps()?.lines().count() >= 3, "the process left behind is gone: {}", container.ps()?);
    // The first exit that is seen is an exec's.
    container.kill("SIGKILL")?;
    container.wait_status("STOPPED")?;
    container.delete()?;
    client.expect_empty()
}

fn pause(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native");
    let run = shell(&client, "while :; do echo tick; sleep 0.05; done")?;
    let job = run.spawn()?;
    job.stdout.wait_text("tick\ntick\n", SOON)?;
    let container = run.handle();
    client.ctr(&["task", "pause", &run.id])?;
    container.wait_event("paused")?;
    ensure!(container.status()?.as_deref() == Some("PAUSED"), "{:?}", container.status()?);
    let before = wait::until("a quiet pipe", SOON, || {
        let seen = job.stdout.so_far().len();
        std::thread::sleep(Duration::from_millis(300));
        Ok((job.stdout.so_far().len() == seen).then_some(seen))
    })?;
    client.ctr(&["task", "resume", &run.id])?;
    container.wait_event("resumed")?;
    job.stdout.wait("more ticks", SOON, |bytes| (bytes.len() > before + 20).then_some(()))?;
    client.ctr(&["task", "pause", &run.id])?;
    // A frozen one can be killed all the same.
    ensure!(container.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
    ensure!(job.wait(SOON)?.code == Some(137));
    client.expect_empty()
}

fn terminal(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native");
    let line = "sleep 1; tty; stty size; read line; echo got $line; exit 5";
    let run = shell(&client, line)?.flag("--tty");
    // `ctr` wants a terminal of its own: `script` makes one.
    let words: Vec<String> = std::iter::once(run.foreground())
        .flat_map(|command| {
            let program = command.get_program().to_owned();
            std::iter::once(program).chain(command.get_args().map(ToOwned::to_owned)).collect::<Vec<_>>()
        })
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let mut command = std::process::Command::new("script");
    command.args(["--quiet", "--return", "--command"]).arg(format!("stty rows 33 cols 77; {}", words.join(" ")));
    command.arg("/dev/null");
    let mut job = Job::spawn(command)?;
    job.stdout.wait_text("33 77", SOON)?;
    job.write(b"word\n")?;
    job.stdout.wait_text("got word", SOON)?;
    let done = job.wait(SOON)?;
    ensure!(done.code == Some(5) && done.text().contains("/dev/pts/0"), "{done:?}");
    client.expect_empty()
}

fn metrics(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native");
    let container = shell(&client, "while :; do :; done")?.option("--memory-limit", "67108864").detached()?;
    let text = wait::until("some CPU time", SOON, || {
        let text = container.metrics()?;
        Ok((number(&text, &["cpuacct.usage", "cpu.usage_usec"]) > 200_000).then_some(text))
    })?;
    let limit = number(&text, &["memory.limit_in_bytes", "memory.usage_limit", "memory.max"]);
    ensure!(number(&text, &["memory.usage_in_bytes", "memory.usage"]) > 4096, "{text}");
    ensure!(limit == 67_108_864 || !text.contains("limit"), "{limit}: {text}");
    ensure!(number(&text, &["pids.current"]) == 1, "{text}");
    container.kill_and_wait("SIGKILL")?;
    container.delete()
}

/// The first number in a row of one of these names; zero without one.
fn number(table: &str, names: &[&str]) -> u64 {
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let row = rows.into_iter().find(|row| row.first().is_some_and(|first| names.contains(first)));
    row.and_then(|row| row.get(1)?.trim_matches(|c: char| !c.is_ascii_digit()).parse().ok()).unwrap_or(0)
}

fn ps(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native");
    let container = shell(&client, "sleep 1000 & sleep 1000 & wait")?.detached()?;
    let pid = container.pid()?.to_string();
    let table = wait::until("three processes", SOON, || {
        let table = container.ps()?;
        Ok((table.lines().count() == 4).then_some(table))
    })?;
    ensure!(table.lines().any(|line| line.split_whitespace().next() == Some(&pid)), "{pid} is not in {table}");
    ensure!(proc::is_running(pid.parse()?), "the task's pid is no process");
    container.kill_and_wait("SIGKILL")?;
    container.delete()
}

fn oom(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("native");
    // `tail` keeps what it reads.
    let run = shell(&client, "exec tail -n 1 /dev/zero")?.option("--memory-limit", "16777216");
    run.expect(137)?;
    containerd.with_events(|events| {
        events.expect_life(&client.namespace, &run.id, &["create", "start", "oom", "exit", "delete"])
    })
}
