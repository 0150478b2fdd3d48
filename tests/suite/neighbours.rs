//! One guest does its worst; a healthy one in the same process measures what it notices of it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::stdio::ticks;
use crate::common::containerd::Containerd;
use crate::common::ctr::Client;
use crate::common::{Outcome, SOON, proc};

pub const CASES: crate::common::Cases = &[
    ("of_guests_that_trap", trapping),
    ("of_a_guest_that_eats_memory", eating),
    ("of_guests_that_spin", spinning),
    ("of_a_writer_to_a_stalled_reader", writing),
    ("of_a_guest_that_exhausts_its_stack", recursing),
    #[cfg(feature = "test-hooks")]
    ("of_a_panic_of_the_host", host_panic),
];

/// A tick of 10 ms; on an idle machine it takes 11.
const TICK: Duration = Duration::from_millis(10);
/// Half of all ticks may be this late, for the spinners have the machine's two cores to themselves as well.
const USUAL: Duration = Duration::from_millis(20);
/// No tick may be later: somewhere between a busy machine and a person who notices.
const WORST: Duration = Duration::from_millis(150);

/// Lets the neighbour tick while `act` happens, then looks at its ticks.
fn beside(containerd: &Containerd, namespace: &str, act: impl FnOnce(&Client<'_>) -> Outcome) -> Outcome {
    let client = containerd.namespace(namespace);
    let run = client.guest("/kit.wasm", &["tick", &TICK.as_millis().to_string()])?;
    let job = run.spawn()?;
    job.stdout.wait_text("tick 20 ", SOON)?;
    let neighbour = run.handle();
    let daemon = neighbour.daemon()?;
    let before = ticks(&job.stdout.text_so_far())?.len();
    act(&client)?;
    // Some more of them: what was done may still be felt.
    let enough = before + 50;
    job.stdout.wait("more ticks", SOON, |bytes| {
        (bytes.iter().filter(|byte| **byte == b'\n').count() > enough).then_some(())
    })?;
    ensure!(neighbour.daemon()? == daemon && proc::is_running(daemon), "the process is another one");
    let seen = ticks(&job.stdout.text_so_far())?;
    expect_unimpressed(&seen[before..])?;
    neighbour.kill("SIGTERM")?;
    ensure!(job.wait(SOON)?.code == Some(143));
    client.expect_empty()
}

fn expect_unimpressed(ticks: &[Duration]) -> Outcome {
    let mut sorted = ticks.to_vec();
    sorted.sort_unstable();
    let (median, worst) = (sorted[sorted.len() / 2], sorted.last().copied().context("no ticks")?);
    ensure!(
        median <= USUAL && worst <= WORST,
        "ticks of {TICK:?}: median {median:?}, worst {worst:?} of {}",
        ticks.len()
    );
    Ok(())
}

fn trapping(containerd: &Containerd) -> Outcome {
    beside(containerd, "trapping", |client| {
        for kit in super::exits::KITS {
            for how in ["trap", "panic", "abort", "trap", "trap"] {
                client.guest(kit, &[how])?.expect(134)?;
            }
        }
        Ok(())
    })
}

fn eating(containerd: &Containerd) -> Outcome {
    beside(containerd, "eating", |client| {
        for kit in super::exits::KITS {
            let run = client.guest(kit, &["eat", "1073741824"])?.option("--memory-limit", "33554432");
            let done = run.expect(137)?;
            let eaten = done.text().lines().count();
            ensure!((16..32).contains(&eaten), "it got {eaten} MiB of 32");
            run.handle().wait_event("oom")?;
            client.containerd.with_events(|events| {
                events.expect_life(&client.namespace, &run.id, &["create", "start", "oom", "exit", "delete"])
            })?;
        }
        Ok(())
    })
}

fn spinning(containerd: &Containerd) -> Outcome {
    beside(containerd, "spinning", |client| {
        let spinners = (0..4).map(|_| client.guest("/kit.wasm", &["spin"])?.detached()).collect::<Result<Vec<_>>>()?;
        std::thread::sleep(Duration::from_secs(1));
        for spinner in spinners {
            ensure!(spinner.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
            spinner.delete()?;
        }
        Ok(())
    })
}

fn writing(containerd: &Containerd) -> Outcome {
    beside(containerd, "writing", |client| {
        let run = client.guest("/kit.wasm", &["write", "1073741824"])?;
        let mut job = run.spawn()?;
        job.stdout.wait("some output", SOON, |bytes| (!bytes.is_empty()).then_some(()))?;
        let writer = run.handle();
        let daemon = writer.daemon()?;
        job.kill()?;
        let before = proc::anonymous_kib(daemon)?;
        std::thread::sleep(Duration::from_secs(1));
        let after = proc::anonymous_kib(daemon)?;
        ensure!(after < before + 4096, "what nobody reads gathers in memory: {before} to {after} KiB");
        ensure!(writer.status()?.as_deref() == Some("RUNNING"));
        ensure!(writer.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
        writer.delete()
    })
}

fn recursing(containerd: &Containerd) -> Outcome {
    beside(containerd, "recursing", |client| {
        for kit in super::exits::KITS {
            client.guest(kit, &["recurse"])?.expect(134)?;
        }
        Ok(())
    })
}

/// The binary of the tests has a host function that panics.
#[cfg(feature = "test-hooks")]
fn host_panic(containerd: &Containerd) -> Outcome {
    beside(containerd, "panicking", |client| {
        let offset = client.containerd.log_length();
        for _ in 0..5 {
            client.guest("/host-panic.wasm", &[])?.expect(255)?;
        }
        let log = client.containerd.whole_log_since(offset);
        ensure!(log.contains("on purpose"), "the log does not tell the cause: {log}");
        Ok(())
    })
}
