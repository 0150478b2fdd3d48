//! What a container costs: `make bench`.
//!
//! | section | question | promise |
//! |---|---|---|
//! | start | how long does `start` take, its daemon living, and launching one? | 5 ms, 40 ms (median) |
//! | run | `ctr run --rm` of a cached hello beside runc's of a static busybox `true`, in turns | ratio ≤ 1.0 |
//! | density | what does a further sleeping container cost its daemon, and what does an idle daemon do? | 400 KiB, 0.5 % |
//!
//! Medians. Needs root, runc and a static busybox (Debian: busybox-static).

#[expect(dead_code, reason = "the tests use the rest of it")]
#[path = "../tests/common/mod.rs"]
mod common;
#[expect(dead_code, reason = "other benches use the rest of it")]
mod report;

use std::fs;
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;

use common::ctr::Client;
use common::shim::Shim;
use common::{guests, image, proc, wait};
use report::{Host, at_most, median};

const STARTS: usize = 200;
const LAUNCHES: usize = 20;
const RUNS: usize = 30;
const SLEEPERS: usize = 100;
/// How long an idle daemon is watched.
const IDLE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    report::main(&[("start", start), ("run", run), ("density", density)])
}

fn start(_: &Host) -> Result<bool> {
    let shim = Shim::new("start")?;
    let bundle = shim.bundle("first", &guests::built("hello.wasm")?, &[])?;
    let once = || -> Result<f64> {
        let mut command = shim.command("start", &bundle);
        command.env("MAX_SHIM_VERSION", "2").stdin(Stdio::null());
        let begin = Instant::now();
        let output = command.output()?;
        let took = millis(begin.elapsed());
        ensure!(output.status.success(), "start failed: {}", String::from_utf8_lossy(&output.stderr));
        Ok(took)
    };
    let mut launching = Vec::new();
    for _ in 0..LAUNCHES {
        launching.push(once()?);
        let daemon = shim.daemon()?;
        proc::signal(daemon, Signal::KILL)?;
        wait::until_true("the daemon to be gone", Duration::from_secs(5), || Ok(!proc::is_running(daemon)))?;
    }
    once()?;
    let living = (0..STARTS).map(|_| once()).collect::<Result<Vec<_>>>()?;
    proc::signal(shim.daemon()?, Signal::TERM)?;
    shim.expect_end()?;
    let kept = at_most("start, the daemon lives", median(living), "ms", 5.0);
    Ok(at_most("start, launching the daemon", median(launching), "ms", 40.0) & kept)
}

fn run(host: &Host) -> Result<bool> {
    let containerd = host.containerd()?;
    let client = containerd.namespace("run");
    let busybox = busybox(containerd.folder())?;
    let ours = || timed(&client.guest("/hello.wasm", &["0"])?);
    let theirs = || timed(&client.rootfs(&busybox, &["/bin/busybox", "true"]).runtime("io.containerd.runc.v2"));
    ours()?;
    theirs()?;
    let (mut wasm, mut runc, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let pair = (ours()?, theirs()?);
        wasm.push(pair.0);
        runc.push(pair.1);
        ratios.push(pair.0 / pair.1);
    }
    println!("ctr run --rm: hello.wasm {:.1} ms, busybox true with runc {:.1} ms", median(wasm), median(runc));
    Ok(at_most("ctr run --rm of a cached hello, beside runc", median(ratios), "x", 1.0))
}

fn timed(run: &common::ctr::Run<'_>) -> Result<f64> {
    let begin = Instant::now();
    run.expect(0)?;
    Ok(millis(begin.elapsed()))
}

fn density(host: &Host) -> Result<bool> {
    let containerd = host.containerd()?;
    let client = containerd.namespace("density");
    client.import(image::GUESTS, &image::guests()?)?;
    let sleeper = || client.image(image::GUESTS, &["/kit.wasm", "sleep", "0"]).detached();
    // The first ones pay for what all share: the engine, the code, the threads.
    let mut containers = vec![sleeper()?, sleeper()?];
    let daemon = client.daemon()?;
    let before = report::pss_kib(daemon)?;
    let begin = Instant::now();
    for _ in 0..SLEEPERS {
        containers.push(sleeper()?);
    }
    let rate = SLEEPERS as f64 / begin.elapsed().as_secs_f64();
    let each = (report::pss_kib(daemon)?.saturating_sub(before)) as f64 / SLEEPERS as f64;
    println!("{SLEEPERS} further containers in one daemon of {before} KiB PSS: {rate:.0} a second by ctr run -d");
    let kept = at_most("PSS of a further sleeping container", each, "KiB", 400.0);
    let busy = idle_load(daemon)?;
    end(&client, containers)?;
    Ok(at_most("CPU of a daemon with 100 sleeping containers, of a core", busy, "%", 0.5) & kept)
}

/// Share of a core that a process uses while nothing happens, in percent.
fn idle_load(pid: u32) -> Result<f64> {
    let ticks = |pid| proc::cpu_ticks(pid).map(|ticks| ticks as f64 / rustix::param::clock_ticks_per_second() as f64);
    let before = ticks(pid)?;
    // The one place that waits for time itself: it is what is measured.
    std::thread::sleep(IDLE);
    Ok((ticks(pid)? - before) / IDLE.as_secs_f64() * 100.0)
}

fn end(client: &Client<'_>, containers: Vec<common::ctr::Container<'_>>) -> Result<()> {
    for container in &containers {
        container.kill("SIGKILL")?;
    }
    drop(containers);
    client.expect_empty()
}

fn busybox(folder: &Path) -> Result<std::path::PathBuf> {
    let root = folder.join("busybox");
    fs::create_dir_all(root.join("bin"))?;
    fs::copy(report::busybox()?, root.join("bin/busybox"))?;
    Ok(root)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
