//! What it takes to get a module's code: `make bench`.
//!
//! | section | question | promise |
//! |---|---|---|
//! | cold | a container's creation and start, its module compiled | (a figure) |
//! | warm disk | the same in a new process, the code in the cache | 20 × faster than cold |
//! | warm process | the same in a process that has run the module | 5 ms more than beside a running one |
//! | memory | what the process has grown by compiling, beside one that found the code | 1 MiB |
//!
//! For a component of 90 KiB (a command) and one of 18 MiB (a Python server). The bare binary is called as containerd
//! would, so that no client's time is in the figures; the process itself is launched before the clock starts. Needs root.
//! Prints medians.

#[expect(dead_code, reason = "the tests use the rest of it")]
#[path = "../tests/common/mod.rs"]
mod common;
#[expect(dead_code, reason = "other benches use the rest of it")]
mod report;

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use containerd_shim_protos::api;
use containerd_shim_protos::ttrpc::context;
use rustix::process::Signal;
use serde_json::json;

use common::shim::{self, Shim, Task};
use common::{SOON, guests, proc, wait};
use report::{at_least, at_most, median};

/// An interpreter takes its time, on a machine of one slow core too.
const PATIENCE: Duration = Duration::from_secs(300);
/// Starts alone and beside another, in turns, each round.
const PAIRS: usize = 7;
const SIGKILL: u32 = 9;

fn main() -> ExitCode {
    report::main(&[
        ("small", |_| module("hello-component.wasm", &["600"], 15)),
        ("large", |_| module("py.wasm", &[], 3)),
    ])
}

/// What one round saw, in milliseconds and KiB.
#[derive(Default)]
struct Figures {
    cold: Vec<f64>,
    disk: Vec<f64>,
    process: Vec<f64>,
    running: Vec<f64>,
    growth: Vec<f64>,
}

fn module(guest: &str, arguments: &[&str], rounds: usize) -> Result<bool> {
    let bench = Bench { shim: Shim::new(guest.trim_end_matches(".wasm"))?, guest, arguments };
    let mut figures = Figures::default();
    for _ in 0..rounds {
        bench.round(&mut figures)?;
    }
    let Figures { cold, disk, process, running, growth } = figures;
    let [cold, disk, process, running, growth] = [cold, disk, process, running, growth].map(median);
    let kib = fs::metadata(guests::built(guest)?)?.len() >> 10;
    println!(
        "{guest} ({kib} KiB): cold {cold:.1} ms, warm disk {disk:.1} ms, warm process {process:.1} ms, beside a running one \
         {running:.1} ms"
    );
    let mut kept = at_least("start from the disk's cache, times faster than compiling", cold / disk, "x", 20.0);
    kept &= at_most("start in a process that has run it, more than beside it", process - running, "ms", 5.0);
    kept &= at_most("memory the process has grown by compiling", growth, "KiB", 1024.0);
    Ok(kept)
}

struct Bench<'a> {
    shim: Shim,
    guest: &'a str,
    arguments: &'a [&'a str],
}

impl Bench<'_> {
    /// Two processes after another: one that compiles, one that finds.
    fn round(&self, figures: &mut Figures) -> Result<()> {
        match fs::remove_dir_all(self.shim.folder().join("cache")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let (compiling, cold) = self.started("cold")?;
        figures.cold.push(cold);
        let compiled = proc::anonymous_kib(self.shim.daemon()?)? as f64;
        self.end_daemon(compiling)?;

        let (first, disk) = self.started("disk")?;
        figures.disk.push(disk);
        figures.growth.push(compiled - proc::anonymous_kib(self.shim.daemon()?)? as f64);
        self.end(first)?;
        for _ in 0..PAIRS {
            let (alone, process) = self.started("process")?;
            figures.process.push(process);
            let (beside, running) = self.started("running")?;
            figures.running.push(running);
            self.end(beside)?;
            self.end(alone)?;
        }
        let (last, _) = self.started("last")?;
        self.end_daemon(last)
    }

    /// A container that runs, and how long it took from its process to there.
    fn started(&self, id: &str) -> Result<(Task, f64)> {
        let name = format!("/{}", self.guest);
        let words: Vec<String> = [name.as_str()].iter().chain(self.arguments).map(|&word| word.to_owned()).collect();
        let mut spec = shim::spec(&words);
        spec["process"]["env"] = json!(["PATH=/bin", "WASMTIME_HTTP_PROXY_SOCKET_ADDR=127.0.0.1:0"]);
        let bundle = self.shim.bundle_of(id, &spec)?;
        fs::copy(guests::built(self.guest)?, bundle.folder.join("rootfs").join(self.guest))?;
        let options = format!("cache_dir = \"{}/cache\"\ncompile_timeout = \"5m\"", self.shim.folder().display());
        let task = Task::connect(&shim::address(&self.shim.start_with(&bundle, &options)?)?, &bundle)?;
        let request =
            api::CreateTaskRequest { id: id.into(), bundle: bundle.folder.display().to_string(), ..Default::default() };
        let begin = Instant::now();
        task.client().create(context::with_duration(PATIENCE), &request).context("create")?;
        task.start().context("start")?;
        Ok((task, begin.elapsed().as_secs_f64() * 1000.0))
    }

    fn end(&self, task: Task) -> Result<()> {
        task.kill(SIGKILL)?;
        task.wait()?;
        task.delete()?;
        Ok(fs::remove_dir_all(&task.folder)?)
    }

    /// The process goes with its container, so that the next one starts anew.
    fn end_daemon(&self, task: Task) -> Result<()> {
        let daemon = self.shim.daemon()?;
        self.end(task)?;
        proc::signal(daemon, Signal::TERM)?;
        wait::until_true("the daemon to be gone", SOON, || Ok(!proc::is_running(daemon)))
    }
}
