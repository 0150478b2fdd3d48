//! CPU quotas and memory limits of commands: kept, told, changed while they run.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use super::exits::KITS;
use crate::common::api::Api;
use crate::common::containerd::Containerd;
use crate::common::ctr::Container;
use crate::common::machine::undisturbed;
use crate::common::usage::Usage;
use crate::common::{Outcome, SOON, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("a_quota_is_kept", kept),
    ("a_quota_is_changed_under_a_running_guest", changed),
    ("a_throttled_guest_is_ended_at_once", ended),
    ("a_guest_below_its_quota_is_not_throttled", below),
    ("cpu_time_adds_up", cpu_adds_up),
    ("memory_adds_up_and_its_limit_changes", memory),
    ("limits_that_cannot_be_are_refused", refused),
];

/// Long enough for a window more or less at its ends to matter little.
const LONG: Duration = Duration::from_secs(2);
/// A signal by way of `ctr`, and the event back.
const PROMPT: Duration = Duration::from_millis(500);
const MIB: u64 = 1 << 20;

/// How much of a core the container takes from now on, for some time.
pub fn rate(api: &Api<'_>, id: &str) -> Result<f64> {
    let before = api.usage(id)?;
    thread::sleep(LONG);
    Ok(api.usage(id)?.cores_since(&before))
}

/// Within a tenth.
pub fn expect_rate(quota: f64, rate: f64) -> Outcome {
    ensure!((quota * 0.9..quota * 1.1).contains(&rate), "{rate:.3} of a core, the quota is {quota}");
    Ok(())
}

fn kill(container: Container<'_>) -> Outcome {
    ensure!(container.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
    container.delete()
}

fn kept(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "limits")?;
    for (kit, flags, quota) in [
        (KITS[0], &["--cpus", "0.2"][..], 0.2),
        (KITS[1], &["--cpus", "0.3"], 0.3),
        (KITS[0], &["--cpu-quota", "2000", "--cpu-period", "10000"], 0.2),
    ] {
        let run = flags.iter().fold(api.client.guest(kit, &["spin"])?, |run, flag| run.flag(flag));
        let container = run.detached()?;
        let daemon = container.daemon()?;
        undisturbed(|| {
            let (before, ticks) = (api.usage(&run.id)?, proc::cpu_ticks(daemon)?);
            expect_rate(quota, rate(&api, &run.id)?)?;
            // The kernel's own account of the process, in hundredths of a second: it has little else to do.
            let (after, ticks) = (api.usage(&run.id)?, proc::cpu_ticks(daemon)? - ticks);
            let took = (after.at - before.at).as_secs_f64();
            ensure!((ticks as f64 / 100.0) < took * (quota * 1.1 + 0.05), "the process took {ticks} ticks in {took} s");
            expect_throttled(&after, &before)
        })?;
        kill(container)?;
    }
    api.client.expect_empty()
}

/// Nearly every period, for nearly all of the rest of it.
fn expect_throttled(after: &Usage, before: &Usage) -> Outcome {
    let (periods, throttled) = (after.periods - before.periods, after.throttled_periods - before.throttled_periods);
    ensure!(periods >= 15 && throttled * 10 >= periods * 8, "{throttled} of {periods} periods were throttled");
    let (took, time) = (after.at - before.at, after.throttled - before.throttled);
    // On a busy machine it takes longer to use up its time, and waits less.
    ensure!(time > took / 5 && time < took, "it waited {time:?} of {took:?}");
    Ok(())
}

fn changed(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "limits")?;
    let run = api.client.guest("/kit.wasm", &["spin"])?.option("--cpus", "0.1");
    let container = run.detached()?;
    undisturbed(|| expect_rate(0.1, rate(&api, &run.id)?))?;
    for (resources, quota) in [
        (json!({ "cpu": { "quota": 30_000 } }), 0.3),
        (json!({ "cpu": { "quota": 10_000, "period": 50_000 } }), 0.2),
        // What is not named stays.
        (json!({ "cpu": { "shares": 512 }, "memory": { "limit": 64 * MIB } }), 0.2),
        (json!({ "cpu": { "period": 100_000 } }), 0.1),
    ] {
        api.update(&run.id, &resources)?;
        undisturbed(|| expect_rate(quota, rate(&api, &run.id)?))?;
    }
    let error = api.update(&run.id, &json!({ "cpu": { "quota": 5 } })).err().map(|error| format!("{error:#}"));
    ensure!(error.as_ref().is_some_and(|error| error.contains("linux.resources.cpu.quota: 5 µs")), "{error:?}");
    undisturbed(|| expect_rate(0.1, rate(&api, &run.id)?))?;
    // One that owes for a long time goes on as soon as it may.
    api.update(&run.id, &json!({ "cpu": { "quota": 1000, "period": 1_000_000 } }))?;
    wait::until_true("it to be throttled", SOON, || {
        let before = api.usage(&run.id)?.cpu;
        thread::sleep(Duration::from_millis(200));
        Ok(api.usage(&run.id)?.cpu == before)
    })?;
    api.update(&run.id, &json!({ "cpu": { "quota": -1 } }))?;
    let (begin, before) = (Instant::now(), api.usage(&run.id)?);
    wait::until_true("it to run", SOON, || Ok(api.usage(&run.id)?.cpu > before.cpu + Duration::from_millis(20)))?;
    ensure!(begin.elapsed() < Duration::from_millis(900), "it took {:?}", begin.elapsed());
    let free = rate(&api, &run.id)?;
    ensure!(free > 0.4, "{free} of a core without a quota");
    kill(container)?;
    api.client.expect_empty()
}

fn ended(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "limits")?;
    for (number, kit) in KITS.into_iter().enumerate() {
        let run = api.client.guest(kit, &["spin"])?.option("--cpu-quota", "1000").option("--cpu-period", "1000000");
        let container = run.detached()?;
        wait::until_true("it to be throttled", SOON, || Ok(api.usage(&run.id)?.throttled_periods > 0))?;
        let begin = Instant::now();
        ensure!(container.status()?.as_deref() == Some("RUNNING"));
        ensure!(begin.elapsed() < PROMPT, "its state took {:?}", begin.elapsed());
        let (signal, code) = [("SIGTERM", 143), ("SIGKILL", 137)][number % 2];
        let (exit, took) = container.kill_and_wait(signal)?;
        ensure!(exit.exit_code() == code && took < PROMPT, "{exit:?} after {took:?}");
        container.delete()?;
    }
    api.client.expect_empty()
}

fn below(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "limits")?;
    let run = api.client.guest("/kit.wasm", &["tick", "10"])?.option("--cpus", "0.5");
    let container = run.detached()?;
    let before = api.usage(&run.id)?;
    thread::sleep(Duration::from_secs(1));
    let after = api.usage(&run.id)?;
    ensure!(after.periods > before.periods && after.throttled_periods == 0, "{after:?}");
    ensure!(after.throttled.is_zero() && after.cores_since(&before) < 0.1, "{after:?}");
    kill(container)?;
    api.client.expect_empty()
}

/// Beside the kernel's account of the process, in which nothing else happens.
fn cpu_adds_up(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "adds-up")?;
    for kit in KITS {
        let run = api.client.guest(kit, &["spin"])?;
        let container = run.detached()?;
        let daemon = container.daemon()?;
        undisturbed(|| {
            let (ticks, before) = (proc::cpu_ticks(daemon)?, api.usage(&run.id)?);
            thread::sleep(LONG);
            let (after, ticks) = (api.usage(&run.id)?, proc::cpu_ticks(daemon)? - ticks);
            let (own, process) = ((after.cpu - before.cpu).as_secs_f64(), ticks as f64 / 100.0);
            ensure!((own - process).abs() < process * 0.05 + 0.03, "the guest took {own} s, its process {process} s");
            Ok(())
        })?;
        let text = container.metrics()?;
        ensure!(text.contains("cpu") && text.contains("memory"), "{text}");
        kill(container)?;
    }
    api.client.expect_empty()
}

fn memory(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "limits")?;
    let eaten = 32 * MIB;
    let run = api.client.guest("/kit.wasm", &["eat", &eaten.to_string()])?;
    let run = run.option("--memory-limit", &(64 * MIB).to_string());
    let job = run.spawn()?;
    let container = run.handle();
    job.stdout.wait_text("full", SOON)?;
    let usage = api.usage(&run.id)?;
    ensure!((eaten..eaten + 8 * MIB).contains(&usage.memory), "{usage:?}");
    ensure!(usage.memory_peak >= usage.memory && usage.memory_limit == 64 * MIB, "{usage:?}");
    let error =
        api.update(&run.id, &json!({ "memory": { "limit": 16 * MIB } })).err().map(|error| format!("{error:#}"));
    ensure!(error.as_ref().is_some_and(|error| error.contains("16777216 bytes are less than the")), "{error:?}");
    for (limit, told) in [(-1, u64::MAX), (48 * MIB as i64, 48 * MIB), (0, 48 * MIB)] {
        api.update(&run.id, &json!({ "memory": { "limit": limit } }))?;
        ensure!(api.usage(&run.id)?.memory_limit == told, "{limit}");
    }
    container.kill("SIGKILL")?;
    let done = job.wait(SOON)?;
    ensure!(done.code == Some(137), "{done:?}");
    drop(container);
    api.client.expect_empty()
}

fn refused(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "limits")?;
    for (quota, period, words) in [
        ("500", "100000", "linux.resources.cpu.quota: 500 µs; it may be 1000 and more"),
        ("20000", "500", "linux.resources.cpu.period: 500 µs; it may be 1000 to 1000000"),
    ] {
        let run = api.client.guest("/kit.wasm", &["spin"])?.option("--cpu-quota", quota).option("--cpu-period", period);
        run.expect_error(words)?;
    }
    let run = api.client.guest("/kit.wasm", &["sleep", "0"])?;
    let container = run.detached()?;
    container.kill_and_wait("SIGKILL")?;
    let error = api.update(&run.id, &json!({ "cpu": { "quota": 20_000 } })).err().map(|error| format!("{error:#}"));
    ensure!(error.is_some(), "a container that has ended was updated");
    container.delete()?;
    ensure!(api.update(&run.id, &json!({})).is_err());
    api.client.expect_empty()
}
