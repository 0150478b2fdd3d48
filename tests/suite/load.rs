//! Many containers: at the same time, one after another, and what is left of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::common::containerd::Containerd;
use crate::common::ctr::Container;
use crate::common::job::Job;
use crate::common::proc::{self, Holdings};
use crate::common::shim::Shim;
use crate::common::{Outcome, SOON, guests, wait};

pub const CASES: crate::common::Cases = &[
    ("fifty_containers_run_at_the_same_time", fifty_at_once),
    ("five_hundred_containers_run_one_after_another", one_after_another),
    ("a_hundred_containers_live_in_one_process", a_hundred_alive),
];

pub const BARE: crate::common::BareCases = &[
    ("five_hundred_one_after_another", five_hundred),
    ("containers_that_went_leave_nothing", nothing_stays),
    ("containers_that_failed_leave_nothing", failures_leave_nothing),
];

/// How many `ctr` a machine of two cores runs side by side without one waiting for another.
const HANDS: usize = 4;
/// For all of many: they share the machine.
const LONG: Duration = Duration::from_secs(90);
const SIGKILL: u32 = 9;

/// 50 `ctr run` at once: every exit code and every output arrives, in one process.
fn fifty_at_once(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("fifty");
    let first = client.guest("/kit.wasm", &["sleep", "0"])?.detached()?;
    let mut jobs: Vec<(usize, Job)> = Vec::new();
    // Should a case fail, they take their containers with them.
    let mut handles = Vec::new();
    for number in 0..50 {
        let (file, words) = match number % 2 {
            0 => ("/kit.wasm", ["exit-after".to_owned(), "500".to_owned(), number.to_string()]),
            _ => ("/kit-component.wasm", ["echo".to_owned(), "number".to_owned(), number.to_string()]),
        };
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let run = client.guest(file, &words)?;
        handles.push(run.handle());
        jobs.push((number, run.spawn()?));
    }
    for (number, job) in jobs {
        let done = job.finish(LONG)?;
        let (code, text) = if number % 2 == 0 { (number, String::new()) } else { (0, format!("number {number}\n")) };
        ensure!(done.code == i32::try_from(code).ok() && done.text() == text, "number {number}: {done:?}");
    }
    client.daemon()?;
    ensure!(first.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
    first.delete()?;
    client.expect_empty()
}

fn one_after_another(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("serial");
    let runs = [0, 1, 42, 255].map(|code| Ok((code, client.guest("/kit.wasm", &["exit", &code.to_string()])?)));
    let runs = runs.into_iter().collect::<Result<Vec<_>>>()?;
    for number in 0..500 {
        let (code, run) = &runs[number % runs.len()];
        run.clone().id(&format!("s{number}")).expect(*code)?;
    }
    client.expect_empty()
}

fn a_hundred_alive(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("hundred");
    // The image is imported once, before many ask for it.
    client.guest("/kit.wasm", &[])?;
    let containers = side_by_side((0..100).collect(), |number| {
        let kit = if number % 2 == 0 { "/kit.wasm" } else { "/kit-component.wasm" };
        client.guest(kit, &["sleep", "0"])?.detached()
    })?;
    let tasks = client.tasks()?;
    ensure!(tasks.iter().filter(|(_, status)| status == "RUNNING").count() == 100, "{tasks:?}");
    asleep(client.daemon()?)?;
    side_by_side(containers, |container: Container<'_>| {
        container.kill("SIGKILL")?;
        container.wait_status("STOPPED")?;
        ensure!(container.exit()?.exit_code() == 137, "{}", container.id);
        container.delete()
    })?;
    client.expect_empty()
}

/// A hundred that sleep must not keep the machine awake: below half a percent of a core is promised.
fn asleep(daemon: u32) -> Outcome {
    let (before, began) = (proc::cpu_ticks(daemon)?, Instant::now());
    thread::sleep(Duration::from_secs(2));
    let used = (proc::cpu_ticks(daemon)? - before) as f64 / (began.elapsed().as_secs_f64() * 100.0);
    // 2 seconds have 200 clock ticks: one may fall to it by chance.
    ensure!(used <= 0.011, "a hundred sleeping containers use {:.1} % of a core", used * 100.0);
    Ok(())
}

/// Does something with each, a few at a time.
fn side_by_side<T: Send, R: Send>(items: Vec<T>, work: impl Fn(T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let mut shares: Vec<Vec<T>> = (0..HANDS).map(|_| Vec::new()).collect();
    items.into_iter().enumerate().for_each(|(index, item)| shares[index % HANDS].push(item));
    let work = &work;
    thread::scope(|scope| {
        let hands: Vec<_> = shares
            .into_iter()
            .map(|share| scope.spawn(move || share.into_iter().map(work).collect::<Result<Vec<R>>>()))
            .collect();
        let mut all = Vec::new();
        for hand in hands {
            all.extend(hand.join().map_err(|_| anyhow::anyhow!("a thread of the test panicked"))??);
        }
        Ok(all)
    })
}

fn five_hundred() -> Outcome {
    let shim = Shim::new("load-serial")?;
    let kit = guests::built("kit.wasm")?;
    let sleeper = shim.running("sleeper", &kit, &["sleep", "0"])?;
    for number in 0..500_u32 {
        round(&shim, &kit, number)?;
    }
    ensure!(shim.daemons().len() == 1);
    sleeper.kill(SIGKILL)?;
    ensure!(sleeper.wait()? == 137);
    sleeper.delete()?;
    shim.events.expect_life("r499", &["create", "start", "exit", "delete"])?;
    drop(sleeper);
    shim.expect_end()
}

/// One container's whole life, with a `start` and a connection of its own.
fn round(shim: &Shim, guest: &Path, number: u32) -> Outcome {
    let id = format!("r{number}");
    let code = number % 256;
    let task = shim.running(&id, guest, &["exit", &code.to_string()])?;
    ensure!(task.wait()? == code, "{id}");
    ensure!(task.delete()?.exit_status == code, "{id}");
    task.shutdown()?;
    fs::remove_dir_all(&task.folder).context("the bundle should be free of mounts")
}

/// What a daemon holds, everything but its memory.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    holdings: Holdings,
    sockets: usize,
    cache: BTreeSet<String>,
}

fn left(shim: &Shim, daemon: u32) -> Result<Left> {
    let cache = fs::read_dir(shim.folder().join("cache"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    Ok(Left { holdings: proc::holdings(daemon)?, sockets: proc::sockets(daemon)?.len(), cache })
}

fn nothing_stays() -> Outcome {
    let shim = Shim::new("load-leak")?;
    let kits = [guests::built("kit.wasm")?, guests::built("kit-component.wasm")?];
    // Keeps the daemon; what it holds itself is in both measurements.
    let sleeper = shim.running("sleeper", &kits[0], &["sleep", "0"])?;
    let daemon = shim.daemon()?;
    let rounds = |from: u32, count: u32| -> Outcome {
        (from..from + count).try_for_each(|number| match number % 2 {
            0 => round(&shim, &kits[0], number),
            // A component knows the codes 0 and 1 only.
            _ => shim.running(&format!("r{number}"), &kits[1], &["both", "20"]).and_then(|task| {
                ensure!(task.wait()? == 0);
                task.delete()?;
                Ok(fs::remove_dir_all(&task.folder)?)
            }),
        })
    };
    rounds(0, 200)?;
    let before = settled(&shim, daemon)?;
    let mut growths = Vec::new();
    for batch in 2..5 {
        let memory = proc::anonymous_kib(daemon)?;
        rounds(batch * 100, 100)?;
        growths.push(proc::anonymous_kib(daemon)?.saturating_sub(memory));
    }
    // Threads that only wait for blocking work stay some seconds; everything else is gone at once.
    wait::until_true("the daemon to hold no more than before", SOON, || Ok(left(&shim, daemon)? == before))
        .with_context(|| format!("before {before:?}, after {:?}", left(&shim, daemon)))?;
    let least = growths.iter().min().context("nothing was measured")?;
    ensure!(*least < MEMORY_OF_100, "three times 100 containers that are gone cost {growths:?} KiB");
    let bundles = format!("{}/b/r", shim.folder().display());
    let mounts: Vec<_> = proc::mounts(&daemon.to_string())?.into_iter().filter(|at| at.starts_with(&bundles)).collect();
    ensure!(mounts.is_empty(), "mounts of containers that are gone: {mounts:?}");
    ensure!(!before.cache.iter().any(|name| name.contains("tmp")), "{before:?}");
    sleeper.kill(SIGKILL)?;
    sleeper.wait()?;
    sleeper.delete()?;
    drop(sleeper);
    shim.expect_end()
}

/// In KiB. The allocator takes some memory now and then and keeps it; a leak grows with each batch, and one of 1 KiB a
/// container would be more.
const MEMORY_OF_100: u64 = 100;

/// Waits until two looks a moment apart see the same.
fn settled(shim: &Shim, daemon: u32) -> Result<Left> {
    let pause = Duration::from_secs(11);
    // Idle threads for blocking work end after ten seconds.
    thread::sleep(pause);
    wait::until("the daemon to come to rest", SOON, || {
        let first = left(shim, daemon)?;
        thread::sleep(Duration::from_millis(100));
        Ok((left(shim, daemon)? == first).then_some(first))
    })
}

/// Containers that could not be created or started: the same must hold.
fn failures_leave_nothing() -> Outcome {
    let shim = Shim::new("load-fail")?;
    let kit = guests::built("kit.wasm")?;
    let sleeper = shim.running("sleeper", &kit, &["sleep", "0"])?;
    let daemon = shim.daemon()?;
    let garbage = shim.folder().join("garbage.wasm");
    fs::write(&garbage, b"\0asm\x01\0\0\0 and then nothing of the kind")?;
    let fail = |number: u32| -> Outcome {
        let guest = if number.is_multiple_of(2) { &kit } else { &garbage };
        let bundle = shim.bundle(&format!("f{number}"), guest, &[])?;
        if number.is_multiple_of(2) {
            fs::remove_file(bundle.folder.join("rootfs/kit.wasm"))?;
        }
        let task = shim.task(&bundle)?;
        ensure!(task.create().is_err() || task.start().is_err(), "f{number} ran");
        // containerd deletes what it created; there may be nothing to delete.
        let _ = task.delete();
        Ok(fs::remove_dir_all(&task.folder)?)
    };
    (0..20).try_for_each(fail)?;
    let before = settled(&shim, daemon)?;
    (20..60).try_for_each(fail)?;
    wait::until_true("the daemon to hold no more than before", SOON, || Ok(left(&shim, daemon)? == before))
        .with_context(|| format!("before {before:?}, after {:?}", left(&shim, daemon)))?;
    sleeper.kill(SIGKILL)?;
    sleeper.wait()?;
    sleeper.delete()?;
    drop(sleeper);
    shim.expect_end()
}
