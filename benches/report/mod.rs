//! What all benches share: their sections by name, a private containerd for those that need one, and promises that are kept
//! or not.
//!
//! ```text
//! cargo bench --bench http                       all sections
//! cargo bench --bench http -- throughput         those whose names are given
//! TROUPE_BENCH_CONTAINERD=1.6 cargo bench …      another containerd of the tests than the newest
//! TROUPE_SHIM=FILE cargo bench …                 another binary of the shim than the one just built
//! ```
//! A promise that does not hold makes the run fail, after all sections. On a shared machine the hypervisor gives the cores to
//! others now and then: what is short enough is taken in samples, of which those count in which it did not.

use std::cell::OnceCell;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

use crate::common::base;
use crate::common::containerd::{Containerd, VERSIONS};
use crate::common::machine::Stretch;
use crate::common::node::Cgroups;
use crate::common::proc;

/// A name, and what it measures; false when a promise does not hold.
pub type Section = (&'static str, fn(&Host) -> Result<bool>);

/// What sections measure on.
pub struct Host {
    version: &'static str,
    containerd: OnceCell<Containerd>,
    node: OnceCell<Containerd>,
}

impl Host {
    /// The containerd of this run, started by the first who asks.
    pub fn containerd(&self) -> Result<&Containerd> {
        if self.containerd.get().is_none() {
            let started = Containerd::start(self.version, "bench")?;
            return Ok(self.containerd.get_or_init(|| started));
        }
        self.containerd.get().context("the containerd of this run")
    }

    /// One that makes pods.
    pub fn node(&self) -> Result<&Containerd> {
        if self.node.get().is_none() {
            let started = Containerd::start_node(self.version, "bench-node", Cgroups::Machine)?;
            return Ok(self.node.get_or_init(|| started));
        }
        self.node.get().context("the containerd of this run")
    }
}

/// Runs the sections that the arguments name, or all.
pub fn main(sections: &[Section]) -> ExitCode {
    let outcome = base::create().and_then(|()| all(sections));
    base::remove();
    finish(outcome)
}

/// What a bench's outcome is to whoever started it.
pub fn finish(outcome: Result<bool>) -> ExitCode {
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("the benches cannot run: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn all(sections: &[Section]) -> Result<bool> {
    // `cargo bench` adds an option of its own.
    let asked: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let names: Vec<_> = sections.iter().map(|(name, _)| *name).collect();
    let unknown = asked.iter().find(|name| !names.contains(&name.as_str()));
    ensure!(unknown.is_none(), "there is no section {unknown:?}; there are {names:?}");
    let version = std::env::var("TROUPE_BENCH_CONTAINERD").unwrap_or_else(|_| "2.1".into());
    let version = VERSIONS.into_iter().find(|known| *known == version).context("no such containerd")?;
    println!("{}, containerd {version}", machine());
    let host = Host { version, containerd: OnceCell::new(), node: OnceCell::new() };
    let mut kept = Ok(true);
    for (_, section) in sections.iter().filter(|(name, _)| asked.is_empty() || asked.iter().any(|ask| ask == name)) {
        kept = kept.and_then(|kept| Ok(section(&host)? & kept));
    }
    for containerd in [host.containerd, host.node].into_iter().filter_map(OnceCell::into_inner) {
        containerd.close()?;
    }
    kept
}

/// One line of the report: a figure that should not be larger.
pub fn at_most(what: &str, figure: f64, unit: &str, promise: f64) -> bool {
    line(what, figure, unit, "at most", promise, figure <= promise)
}

/// One line of the report: a figure that should not be smaller.
pub fn at_least(what: &str, figure: f64, unit: &str, promise: f64) -> bool {
    line(what, figure, unit, "at least", promise, figure >= promise)
}

fn line(what: &str, figure: f64, unit: &str, word: &str, promise: f64, kept: bool) -> bool {
    println!("{what:<58} {figure:>9.2} {unit:<4} ({word} {promise}){}", if kept { "" } else { "  NOT KEPT" });
    kept
}

/// Takes samples until so many are undisturbed; of ten times as many at most, those that were disturbed least.
pub fn samples<T>(count: usize, mut take: impl FnMut() -> Result<T>) -> Result<Vec<T>> {
    let (mut taken, mut undisturbed) = (Vec::new(), 0);
    while undisturbed < count && taken.len() < 10 * count {
        let stretch = Stretch::begin()?;
        let figure = take()?;
        let stolen = stretch.stolen()?;
        undisturbed += usize::from(stolen.is_zero());
        taken.push((stolen, figure));
    }
    let all = taken.len();
    taken.sort_by_key(|(stolen, _)| *stolen);
    taken.truncate(count);
    if let Some((stolen, _)) = taken.last().filter(|(stolen, _)| !stolen.is_zero()) {
        println!(
            "disturbed: only {undisturbed} samples of {all} had the cores to themselves, and {stolen:?} is missing"
        );
    }
    Ok(taken.into_iter().map(|(_, figure)| figure).collect())
}

/// Proportional set size in KiB: shared pages counted by share.
pub fn pss_kib(pid: u32) -> Result<u64> {
    proc::memory_kib(pid, "Pss:")
}

/// A static busybox of the machine: what native containers run.
pub fn busybox() -> Result<&'static Path> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().map(Path::new).find(|path| path.exists());
    busybox.context("no busybox; install busybox-static")
}

/// The middle one.
pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Half of the figures lie between the first two, all between the others.
pub fn spread(figures: &[f64]) -> String {
    let mut figures = figures.to_vec();
    figures.sort_by(f64::total_cmp);
    let at = |part: usize| figures.get((figures.len().saturating_sub(1)) * part / 4).copied().unwrap_or(f64::NAN);
    format!("half of {} samples: {:.2} to {:.2}; all: {:.2} to {:.2}", figures.len(), at(1), at(3), at(0), at(4))
}

fn machine() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1).map(str::to_owned));
    let kernel = Command::new("uname").arg("-r").output().map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{cores} cores {}, Linux {}", model.unwrap_or_default(), kernel.unwrap_or_default())
}
