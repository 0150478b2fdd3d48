//! How a container ends and which code is told, for modules and components alike.

use std::time::Duration;

use anyhow::{bail, ensure};

use crate::common::containerd::Containerd;
use crate::common::ctr::Client;
use crate::common::{Outcome, SOON, base, wait};

pub const CASES: crate::common::Cases = &[
    ("a_native_container_ends_with_its_code", native),
    ("code_of_proc_exit", code_of_proc_exit),
    ("code_of_a_return_from_main", returns),
    ("code_of_a_trap", traps),
    ("exhausting_the_stack_is_a_trap", recursion),
    ("code_of_a_signal", signals),
    ("a_spinning_guest_dies_within_100_ms", spinner),
    ("a_sleeping_guest_dies_within_100_ms", sleeper),
    ("a_signal_before_the_end_decides", exit_after),
    ("a_second_signal_changes_nothing", twice),
    ("killing_what_has_exited_is_an_error", late_kill),
    ("an_exported_function_is_the_entrypoint", exports),
    ("the_events_of_a_life_are_complete", events),
    ("both_names_of_the_runtime_work", names),
];

/// The same guest as a module for preview 1 and as a component for 0.2.
pub const KITS: [&str; 2] = ["/kit.wasm", "/kit-component.wasm"];

/// Promised: a killed guest is gone within 100 ms. `ctr` itself takes some of it to send and to tell.
const PROMPT: Duration = Duration::from_millis(100);
/// What the three processes and two sockets between a signal and its event may add on a busy machine.
const OVERHEAD: Duration = Duration::from_millis(150);

fn client(containerd: &Containerd) -> Client<'_> {
    containerd.namespace("exits")
}

/// The harness itself: if this fails, nothing below says anything about the shim.
fn native(containerd: &Containerd) -> Outcome {
    let folder = base::folder("native")?;
    std::fs::create_dir_all(folder.join("bin"))?;
    std::fs::copy("/bin/busybox", folder.join("bin/busybox"))?;
    let client = containerd.namespace("native");
    let run = |words: &[&str]| client.rootfs(&folder, words).runtime("io.containerd.runc.v2");
    let done = run(&["/bin/busybox", "sh", "-c", "echo hi; exit 3"]).expect(3)?;
    ensure!(done.text() == "hi\n", "{done:?}");
    let container = run(&["/bin/busybox", "sleep", "100"]).detached()?;
    container.wait_status("RUNNING")?;
    ensure!(container.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
    container.delete()?;
    client.expect_empty()
}

fn code_of_proc_exit(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        // 126 and above are where the stock preview-1 implementation traps.
        for code in [0, 1, 2, 42, 125, 126, 127, 128, 137, 200, 255] {
            client(containerd).guest(kit, &["exit", &code.to_string()])?.expect(told(kit, code))?;
        }
    }
    client(containerd).guest("/exit-with-code.wasm", &[])?.expect(42)?;
    client(containerd).guest("/run-error.wasm", &[])?.expect(1)?;
    client(containerd).expect_empty()
}

/// The preview-1 adapter in a component knows success and failure only.
fn told(kit: &str, code: i32) -> i32 {
    if kit.contains("component") { code.min(1) } else { code }
}

fn returns(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        client(containerd).guest(kit, &["echo", "done"])?.expect(0)?;
        // A Rust `main` that returns a failure: in a component it is the error of `run`.
        let done = client(containerd).guest(kit, &["read", "/no-such-file"])?.expect(1)?;
        ensure!(done.stderr.contains("/no-such-file"), "{done:?}");
    }
    Ok(())
}

fn traps(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        for how in ["trap", "panic", "abort"] {
            client(containerd).guest(kit, &[how])?.expect(134)?;
        }
        let panicked = client(containerd).guest(kit, &["panic"])?.expect(134)?;
        ensure!(panicked.stderr.contains("a panic on demand"), "the guest's own words are lost: {panicked:?}");
    }
    Ok(())
}

fn recursion(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        client(containerd).guest(kit, &["recurse"])?.expect(134)?;
    }
    Ok(())
}

fn signals(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        for (signal, code) in [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", 137), ("SIGUSR1", 138), ("SIGHUP", 129)] {
            let run = client(containerd).guest(kit, &["sleep", "0"])?;
            let container = run.detached()?;
            let (exit, _) = container.kill_and_wait(signal)?;
            ensure!(exit.exit_code() == code, "{kit}: {signal} gave {exit:?}");
            container.wait_status("STOPPED")?;
            container.delete()?;
        }
    }
    client(containerd).expect_empty()
}

fn spinner(containerd: &Containerd) -> Outcome {
    killed_promptly(containerd, &["spin"])
}

fn sleeper(containerd: &Containerd) -> Outcome {
    killed_promptly(containerd, &["sleep", "0"])
}

/// The best of some: what is promised is the shim's part, and the rest is the machine's mood.
fn killed_promptly(containerd: &Containerd, words: &[&str]) -> Outcome {
    for kit in KITS {
        for (signal, code) in [("SIGTERM", 143), ("SIGKILL", 137)] {
            let mut times = Vec::new();
            for _ in 0..3 {
                let container = client(containerd).guest(kit, words)?.detached()?;
                let (exit, took) = container.kill_and_wait(signal)?;
                ensure!(exit.exit_code() == code, "{kit} {words:?}: {signal} gave {exit:?}");
                container.delete()?;
                times.push(took);
            }
            let best = times.iter().min().copied().unwrap_or_default();
            ensure!(best < PROMPT + OVERHEAD, "{kit} {words:?}: {signal} took {times:?}");
        }
    }
    Ok(())
}

fn exit_after(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        let run = client(containerd).guest(kit, &["exit-after", "60000", "7"])?;
        let container = run.detached()?;
        ensure!(container.kill_and_wait("SIGTERM")?.0.exit_code() == 143);
        container.delete()?;
        client(containerd).guest(kit, &["exit-after", "50", "7"])?.expect(told(kit, 7))?;
    }
    Ok(())
}

fn twice(containerd: &Containerd) -> Outcome {
    let container = client(containerd).guest("/kit.wasm", &["spin"])?.detached()?;
    container.kill("SIGTERM")?;
    let exit = container.exit()?;
    ensure!(exit.exit_code() == 143, "{exit:?}");
    container.wait_status("STOPPED")?;
    container.kill_error()?;
    let exits = containerd.with_events(|events| {
        Ok(events.of("exits", &container.id).into_iter().filter(|event| event.verb == "exit").count())
    })?;
    ensure!(exits == 1, "{exits} exit events");
    container.delete()
}

fn late_kill(containerd: &Containerd) -> Outcome {
    let container = client(containerd).guest("/kit.wasm", &["exit", "5"])?.detached()?;
    ensure!(container.exit()?.exit_code() == 5);
    container.wait_status("STOPPED")?;
    let error = container.kill_error()?;
    ensure!(error.contains("process already finished"), "{error:?}");
    container.delete()
}

/// `FILE#FUNCTION`; what each function does is in the header of tests/guests/exports.
fn exports(containerd: &Containerd) -> Outcome {
    for (file, leave) in [("/exports.wasm", 7), ("/exports-component.wasm", 1)] {
        for (entrypoint, code, said) in [
            (file.to_owned(), 0, "this is _start\n".to_owned()),
            (format!("{file}#other"), 0, format!("this is other\n{file}#other word\n")),
            (format!("{file}#leave"), leave, "this is leave\n".to_owned()),
        ] {
            let done = client(containerd).guest(&entrypoint, &["word"])?.expect(code)?;
            ensure!(done.text() == said, "{entrypoint}: {done:?}");
        }
        client(containerd).guest(&format!("{file}#nosuch"), &[])?.expect_error("nosuch")?;
    }
    // A core function may return anything; a component's says what it means, and `u32` is no way to end.
    client(containerd).guest("/exports-component.wasm#answer", &[])?.expect_error("answer")?;
    client(containerd).expect_empty()
}

fn events(containerd: &Containerd) -> Outcome {
    let client = client(containerd);
    let run = client.guest("/kit.wasm", &["exit", "9"])?;
    run.expect(9)?;
    containerd.with_events(|events| events.expect_life("exits", &run.id, &["create", "start", "exit", "delete"]))?;
    let exit = run.handle().exit()?;
    ensure!(exit.exit_code() == 9 && exit.body["pid"].as_u64().is_some_and(|pid| pid > 1), "{exit:?}");
    if exit.body["id"].as_str() != Some(&run.id) || exit.body["exited_at"].is_null() {
        bail!("an exit without id or time: {exit:?}");
    }
    Ok(())
}

fn names(containerd: &Containerd) -> Outcome {
    for name in ["io.containerd.wasmtime.v1", "io.containerd.wasm.v1"] {
        client(containerd).guest("/kit.wasm", &["exit", "4"])?.runtime(name).options(containerd.options()).expect(4)?;
    }
    wait::until_true("no task", SOON, || Ok(client(containerd).tasks()?.is_empty()))
}
