//! Guests that take all they can get, several at a time: control stays quick, and the neighbours get their share.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::exits::KITS;
use super::stdio;
use crate::common::containerd::Containerd;
use crate::common::ctr::{Client, Container};
use crate::common::machine::undisturbed;
use crate::common::{Outcome, SOON, guests, image, proc};

pub const CASES: crate::common::Cases = &[
    ("spinners_are_killed_promptly_beside_each_other", spinners),
    ("a_host_call_that_asks_for_random_without_end", random),
    ("a_component_asks_for_more_random_than_there_is", random_of_component),
    ("an_instruction_that_no_tick_interrupts", filling),
    ("three_outputs_that_nobody_reads_cost_no_memory", stalled),
];

/// For a signal by way of `ctr` and an event back, beyond the shim's own 100 ms.
const PROMPT: Duration = Duration::from_millis(250);
/// No tick of 10 ms may take longer: `ctr` and containerd work on the same two cores.
const WORST: Duration = Duration::from_millis(150);
/// And nine of ten have to come in this time.
const USUAL: Duration = Duration::from_millis(30);

/// Lets a healthy container tick while the others do their worst, and looks at its ticks afterwards.
fn beside(client: &Client<'_>, act: impl FnMut() -> Outcome) -> Outcome {
    beside_within(client, USUAL, WORST, act)
}

fn beside_within(
    client: &Client<'_>,
    most_within: Duration,
    all_within: Duration,
    mut act: impl FnMut() -> Outcome,
) -> Outcome {
    undisturbed(|| beside_once(client, most_within, all_within, &mut act))
}

fn beside_once(
    client: &Client<'_>,
    most_within: Duration,
    all_within: Duration,
    act: &mut impl FnMut() -> Outcome,
) -> Outcome {
    let run = client.guest("/kit.wasm", &["tick", "10"])?;
    let job = run.spawn()?;
    // Until the end: a handle that goes out of scope removes its container.
    let neighbour = run.handle();
    job.stdout.wait_text("tick 20 ", SOON)?;
    let daemon = client.daemon()?;
    let before = stdio::ticks(&job.stdout.text_so_far())?.len();
    act()?;
    ensure!(client.daemon()? == daemon, "the process is another one");
    neighbour.kill("SIGTERM")?;
    let done = job.wait(SOON)?;
    ensure!(done.code == Some(143), "the neighbour ended with {:?}: {}", done.code, done.stderr);
    let mut during = stdio::ticks(&done.text())?.split_off(before);
    during.sort_unstable();
    let worst = during.last().copied().context("no tick at all")?;
    let usual = during[during.len() * 9 / 10];
    ensure!(
        worst < all_within && usual < most_within,
        "of {} ticks 90 % took {usual:?}, the worst {worst:?}",
        during.len()
    );
    client.expect_empty()
}

/// Kills each, and tells how long it took until containerd knew.
fn killed(containers: Vec<Container<'_>>) -> Result<Vec<Duration>> {
    let mut times = Vec::new();
    for (number, container) in containers.into_iter().enumerate() {
        let (signal, code) = if number % 2 == 0 { ("SIGKILL", 137) } else { ("SIGTERM", 143) };
        let (exit, took) = container.kill_and_wait(signal)?;
        ensure!(exit.exit_code() == code, "{exit:?}");
        container.delete()?;
        times.push(took);
    }
    times.sort_unstable();
    Ok(times)
}

/// More than twice as many as the machine has cores.
fn spinners(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("spinners");
    beside(&client, || {
        let count = thread::available_parallelism()?.get() * 2 + 1;
        let spinning = (0..count).map(|number| client.guest(KITS[number % 2], &["spin"])?.detached());
        let spinning = spinning.collect::<Result<Vec<_>>>()?;
        thread::sleep(Duration::from_secs(1));
        // Meanwhile others start, run and end.
        client.guest("/kit.wasm", &["exit", "9"])?.expect(9)?;
        let times = killed(spinning)?;
        ensure!(times[times.len() / 2] < PROMPT, "kills took {times:?}");
        Ok(())
    })
}

/// 64 MiB a call: some hundred milliseconds, should it not yield meanwhile.
const GREEDY: &str = r#"(module
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (memory (export "memory") 1025)
  (func (export "_start") (loop (drop (call $random (i32.const 0) (i32.const 67108864))) (br 0))))"#;

fn random(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("random");
    let tar = image::pack("greedy", &[&guests::inline("greedy.wasm", GREEDY)?], &["--workdir=/"])?;
    client.import("test.local/greedy:latest", &tar)?;
    beside(&client, || {
        let greedy = (0..3).map(|_| client.image("test.local/greedy:latest", &["/greedy.wasm"]).detached());
        let greedy = greedy.collect::<Result<Vec<_>>>()?;
        thread::sleep(Duration::from_secs(1));
        ensure!(greedy[0].status()?.as_deref() == Some("RUNNING"), "it should go on for ever");
        let times = killed(greedy)?;
        ensure!(times[times.len() / 2] < PROMPT, "kills took {times:?}");
        Ok(())
    })
}

/// What a reasonable guest asks for, it gets.
fn random_of_component(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("random2");
    for (kit, count) in [(KITS[0], 3_000_001), (KITS[1], 1_000_000)] {
        let done = client.guest(kit, &["random", &count.to_string()])?.expect(0)?;
        let text = done.text();
        ensure!(text.trim().len() == 2 * count, "{} characters", text.len());
        // Not a single stretch of it was left out.
        ensure!(text.trim().as_bytes().chunks(64).all(|chunk| chunk.iter().any(|digit| *digit != b'0')));
    }
    // Over in a few ticks, and three clients start meanwhile: "nine of ten" would be the worst of them.
    beside_within(&client, WORST, WORST, || {
        let greedy = (0..3).map(|_| client.guest("/kit-component.wasm", &["random", "70000000"])?.spawn());
        for job in greedy.collect::<Result<Vec<_>>>()? {
            let done = job.finish(SOON)?;
            ensure!(done.code == Some(134) || done.code == Some(1), "{done:?}");
        }
        Ok(())
    })
}

/// As many as there are cores, and one more; without threads to spare the neighbour's median is 300 ms.
fn filling(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("filling");
    // Page faults of a gigabyte and a half are the kernel's, and the whole machine feels them.
    beside_within(&client, Duration::from_millis(150), Duration::from_secs(1), || {
        let filling = (0..3).map(|_| client.guest("/fill.wasm", &[])?.detached());
        let filling = filling.collect::<Result<Vec<_>>>()?;
        thread::sleep(Duration::from_secs(2));
        killed(filling).map(drop)
    })
}

fn stalled(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("stalled");
    beside(&client, || {
        let before = proc::anonymous_kib(client.daemon()?)?;
        let mut writers = Vec::new();
        for kit in ["/kit.wasm", "/kit-component.wasm", "/kit.wasm"] {
            let run = client.guest(kit, &["write", "1073741824"])?;
            let mut job = run.spawn()?;
            job.stdout.wait("some output", SOON, |bytes| (!bytes.is_empty()).then_some(()))?;
            // The FIFOs stay, and nobody reads them any more.
            job.kill()?;
            writers.push(run.handle());
        }
        thread::sleep(Duration::from_secs(1));
        let growth = proc::anonymous_kib(client.daemon()?)?.saturating_sub(before);
        ensure!(growth < 16 * 1024, "three stalled outputs take {growth} KiB");
        for writer in &writers {
            ensure!(writer.status()?.as_deref() == Some("RUNNING"), "it should be waiting for its reader");
        }
        let times = killed(writers)?;
        ensure!(times[times.len() / 2] < PROMPT, "kills took {times:?}");
        Ok(())
    })
}
