//! stdin, stdout and stderr: complete, in order, and of no consequence to a neighbour.

use std::fs;
use std::time::Duration;

use anyhow::{Context, ensure};

use super::exits::KITS;
use crate::common::containerd::Containerd;
use crate::common::ctr::Client;
use crate::common::{Outcome, SOON, base, guests, image};

pub const CASES: crate::common::Cases = &[
    ("arguments_arrive_as_given", arguments),
    ("the_environment_is_the_containers_only", environment),
    ("stdin_is_copied_and_ends", stdin),
    ("input_that_ended_early_ends", early_end),
    ("stdin_arrives_while_the_guest_runs", interactive),
    ("stdout_and_stderr_are_apart", apart),
    ("ten_mebibytes_are_complete_at_exit", large),
    ("a_stalled_reader_does_not_delay_a_neighbour", stalled_reader),
    ("a_stalled_reader_does_not_save_a_guest", stalled_and_killed),
    ("output_survives_detach_and_attach", detach),
    ("a_log_file_gets_everything", log_file),
    ("without_stdio_a_guest_runs", null_io),
    ("files_of_the_image_are_seen", files),
    ("a_read_only_root_is_read_only", read_only),
    ("devices_are_the_harmless_ones", devices),
];

const MIB: usize = 1024 * 1024;

fn client(containerd: &Containerd) -> Client<'_> {
    containerd.namespace("stdio")
}

fn arguments(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        let words = ["args", "", " two words ", "*", "$HOME", "a=b", "--flag", "ünïcödé", "\"'"];
        let done = client(containerd).guest(kit, &words)?.expect(0)?;
        let expected: String = [kit].iter().chain(&words).map(|word| format!("{word}\n")).collect();
        ensure!(done.text() == expected, "{:?} instead of {expected:?}", done.text());
    }
    Ok(())
}

fn environment(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        let run = client(containerd).guest(kit, &["env"])?.option("--env", "COLOUR=red").option("--env", "EMPTY=");
        let text = run.expect(0)?.text();
        ensure!(text.contains("COLOUR=red\n") && text.contains("EMPTY=\n") && text.contains("PATH=/bin\n"), "{text}");
        // containerd of the tests has TROUPE_TEST_SECRET in its own environment.
        for own in ["TROUPE", "TTRPC_ADDRESS", "GRPC_ADDRESS", "MAX_SHIM_VERSION", "NAMESPACE"] {
            ensure!(!text.contains(own), "the shim's own {own} reached the guest: {text}");
        }
    }
    Ok(())
}

fn stdin(containerd: &Containerd) -> Outcome {
    let input: Vec<u8> = (0..3 * MIB).map(|index| (index * 7 % 251) as u8).collect();
    for kit in KITS {
        let mut job = client(containerd).guest(kit, &["cat"])?.spawn()?;
        job.write(&input)?;
        let done = job.finish(SOON)?;
        ensure!(done.code == Some(0) && done.stdout == input, "{} of {} bytes", done.stdout.len(), input.len());
    }
    Ok(())
}

/// `ctr` forgets to say so when its input ends before the task is there.
fn early_end(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        let mut job = client(containerd).guest(kit, &["cat"])?.spawn()?;
        job.write(b"short")?;
        let done = job.finish(SOON)?;
        ensure!(done.code == Some(0) && done.stdout == b"short", "{done:?}");
    }
    Ok(())
}

fn interactive(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        let mut job = client(containerd).guest(kit, &["cat"])?.spawn()?;
        for word in ["first\n", "second\n", "third\n"] {
            job.write(word.as_bytes())?;
            job.stdout.wait_text(word, SOON)?;
        }
        let done = job.finish(SOON)?;
        ensure!(done.code == Some(0) && done.text() == "first\nsecond\nthird\n", "{done:?}");
    }
    Ok(())
}

fn apart(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        let done = client(containerd).guest(kit, &["both", "1000"])?.expect(0)?;
        let lines = |word: &str| (1..=1000).map(|number| format!("{word} {number}\n")).collect::<String>();
        ensure!(done.text() == lines("out") && done.stderr == lines("err"), "{done:?}");
    }
    Ok(())
}

fn large(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        for _ in 0..3 {
            let total = 10 * MIB;
            let done = client(containerd).guest(kit, &["write", &total.to_string()])?.expect(0)?;
            expect_pattern(&done.stdout, total)?;
        }
    }
    Ok(())
}

/// What `kit write` writes: at each offset divisible by 16, the offset itself.
pub fn expect_pattern(bytes: &[u8], total: usize) -> Outcome {
    ensure!(bytes.len() == total, "{} bytes of {total}", bytes.len());
    let wrong = bytes.chunks(16).enumerate().find(|(index, line)| {
        let expected = format!("{:015x}\n", index * 16);
        !expected.as_bytes().starts_with(line)
    });
    ensure!(wrong.is_none(), "wrong at line {wrong:?}");
    Ok(())
}

/// A container whose output nobody reads: the FIFOs of a detached run whose `ctr` is gone.
fn stalled_reader(containerd: &Containerd) -> Outcome {
    let writer = client(containerd).guest("/kit.wasm", &["write", &(256 * MIB).to_string()])?;
    let mut job = writer.spawn()?;
    job.stdout.wait("some output", SOON, |bytes| (!bytes.is_empty()).then_some(()))?;
    job.kill()?;
    let stalled = writer.handle();
    for kit in KITS {
        let done = client(containerd).guest(kit, &["tick", "10", "50"])?.expect(0)?;
        let worst = ticks(&done.text())?.into_iter().max().unwrap_or_default();
        ensure!(worst < Duration::from_millis(60), "a tick of 10 ms took {worst:?}");
    }
    ensure!(stalled.status()?.as_deref() == Some("RUNNING"), "the writer should be waiting for its reader");
    ensure!(stalled.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
    Ok(())
}

/// The times of `kit tick`'s lines.
pub fn ticks(text: &str) -> anyhow::Result<Vec<Duration>> {
    let lines = text.lines().filter(|line| line.starts_with("tick "));
    lines.map(|line| Ok(Duration::from_micros(line.rsplit(' ').next().context("no time")?.parse()?))).collect()
}

fn stalled_and_killed(containerd: &Containerd) -> Outcome {
    for (signal, code) in [("SIGTERM", 143), ("SIGKILL", 137)] {
        let run = client(containerd).guest("/kit-component.wasm", &["write", &(256 * MIB).to_string()])?;
        let mut job = run.spawn()?;
        job.stdout.wait("some output", SOON, |bytes| (!bytes.is_empty()).then_some(()))?;
        job.kill()?;
        let (exit, took) = run.handle().kill_and_wait(signal)?;
        ensure!(exit.exit_code() == code, "{signal}: {exit:?}");
        // Nobody drains the FIFO: whatever grace the shim grants its output, it has to end.
        ensure!(took < Duration::from_secs(5), "{signal} took {took:?}");
    }
    Ok(())
}

fn detach(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        let run = client(containerd).guest(kit, &["tick", "20"])?;
        let mut first = run.spawn()?;
        first.stdout.wait_text("tick 3 ", SOON)?;
        first.kill()?;
        let container = run.handle();
        let second = container.attach()?;
        second.stdout.wait("a later tick", SOON, |bytes| {
            let text = String::from_utf8_lossy(bytes).into_owned();
            text.lines().filter(|line| line.starts_with("tick ")).nth(5).map(drop)
        })?;
        ensure!(container.status()?.as_deref() == Some("RUNNING"), "it should not have noticed");
        let (exit, _) = container.kill_and_wait("SIGTERM")?;
        ensure!(exit.exit_code() == 143, "{exit:?}");
        let done = second.wait(SOON)?;
        ensure!(done.code == Some(143), "ctr attach ended with {done:?}");
    }
    Ok(())
}

fn log_file(containerd: &Containerd) -> Outcome {
    for (index, kit) in KITS.iter().enumerate() {
        let file = base::folder("logs")?.join(format!("{}-{index}.log", containerd.version));
        let container = client(containerd).guest(kit, &["both", "2000"])?.logged(&file)?;
        ensure!(container.exit()?.exit_code() == 0);
        let text = fs::read_to_string(&file).context("the log file")?;
        let lines = |word: &str| text.lines().filter(|line| line.starts_with(word)).count();
        ensure!((lines("out "), lines("err ")) == (2000, 2000), "{} and {}", lines("out "), lines("err "));
        container.delete()?;
    }
    Ok(())
}

fn null_io(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        let container = client(containerd).guest(kit, &["write", &MIB.to_string()])?.detached()?;
        ensure!(container.exit()?.exit_code() == 0);
        container.delete()?;
    }
    Ok(())
}

fn files(containerd: &Containerd) -> Outcome {
    let note = base::folder("files")?.join("note");
    fs::write(&note, "from the image\n")?;
    let option = format!("--file={}:/etc/note", note.display());
    let kit = guests::built("kit.wasm")?;
    let tar = image::pack("files", &[&kit, &guests::built("kit-component.wasm")?], &[&option])?;
    let client = client(containerd);
    client.import("test.local/files:latest", &tar)?;
    for kit in KITS {
        let run = |words: &[&str]| client.image("test.local/files:latest", &[&[kit], words].concat());
        ensure!(run(&["ls", "/"]).expect(0)?.text() == "dev\netc\nkit-component.wasm\nkit.wasm\nrun\n");
        ensure!(run(&["read", "/etc/note"]).expect(0)?.text() == "from the image\n");
        ensure!(run(&["read", "etc/../etc/note"]).expect(0)?.text() == "from the image\n");
        run(&["write-file", "/etc/note", "changed"]).expect(0)?;
        ensure!(run(&["read", "/etc/note"]).expect(0)?.text() == "from the image\n", "a container changed its image");
        ensure!(run(&["cwd"]).expect(0)?.text() == "/\n");
    }
    Ok(())
}

fn read_only(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        let run = client(containerd).guest(kit, &["write-file", "/new", "text"])?;
        run.expect(0)?;
        run.clone().id("readonly").flag("--read-only").expect(1)?;
    }
    Ok(())
}

fn devices(containerd: &Containerd) -> Outcome {
    for kit in KITS {
        let run = |words: &[&str]| client(containerd).guest(kit, words);
        let names = run(&["ls", "/dev"])?.expect(0)?.text();
        ensure!(names == "full\nnull\nrandom\nshm\nurandom\nzero\n", "/dev holds {names}");
        ensure!(run(&["read", "/dev/null"])?.expect(0)?.text().is_empty());
        run(&["write-file", "/dev/null", "text"])?.expect(0)?;
        run(&["write-file", "/dev/full", "text"])?.expect(1)?;
        let zeros = run(&["read", "/dev/zero"])?;
        let job = zeros.spawn()?;
        job.stdout.wait("zeros", SOON, |bytes| (bytes.len() > MIB).then_some(bytes.iter().all(|byte| *byte == 0)))?;
        zeros.handle().kill("SIGKILL")?;
    }
    Ok(())
}
