//! Swap that is switched on while a server runs: its instances are cleaned another way from then on, because a page that
//! is not in memory escapes the scan for written ones.
//!
//! On one version only: the case changes the machine for as long as it runs. Where swap is on already it stays as it is,
//! and the daemon has to say that it found it so. Where the kernel lets nobody switch it on (inside a container, say), the
//! case says that it proved nothing.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::common::containerd::Containerd;
use crate::common::http::{self, Protocol};
use crate::common::{Outcome, SOON, base, job, site, wait};

pub const CASES: crate::common::Cases = &[("swap_changes_how_instances_are_cleaned", changed)];

/// Bytes; mkswap wants a few pages.
const SIZE: u64 = 16 << 20;
const SECRET: &str = "seen by nobody else, whatever the kernel does";

fn changed(containerd: &Containerd) -> Outcome {
    if containerd.version != "2.1" {
        return Ok(());
    }
    let offset = containerd.log_length();
    let site = site::web(&containerd.namespace("swap"), &[])?;
    let visit = |path: &'static str, expected: &'static str| {
        http::block_on(async move {
            let mut client = http::Connection::open(site.addr, Protocol::One).await?;
            client.post(path, SECRET).await?.expect(200, expected)
        })
    };
    visit("/remember", "ok\n")?;
    visit("/search", "found 0\n")?;
    let swap = Swap::on();
    if let Err(error) = &swap {
        eprintln!("not tested, because swap cannot be switched on here: {error:#}");
        return Ok(());
    }
    wait::until_true("the daemon to notice the swap", SOON, || {
        Ok(containerd.whole_log_since(offset).contains("cleaned by remapping"))
    })?;
    // The program has moved to another pool: it serves as before, and forgets as before.
    for _ in 0..20 {
        visit("/remember", "ok\n")?;
        visit("/search", "found 0\n")?;
    }
    site.drain("SIGTERM", 0).map(drop)
}

/// A swap area of the test's own; `None` where the machine has one.
struct Swap(Option<PathBuf>);

impl Swap {
    fn on() -> Result<Self> {
        if std::fs::read_to_string("/proc/swaps")?.lines().nth(1).is_some() {
            return Ok(Self(None));
        }
        let path = base::folder("swap")?.join("area");
        // Without holes, which the kernel does not take.
        let file = File::create(&path)?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, SIZE).context("fallocate")?;
        rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o600))?;
        tool("mkswap", &path)?;
        tool("swapon", &path)?;
        Ok(Self(Some(path)))
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        if let Some(path) = &self.0
            && let Err(error) = tool("swapoff", path)
        {
            eprintln!("{} is left as swap: {error:#}", path.display());
        }
    }
}

fn tool(name: &str, path: &Path) -> Result<()> {
    let mut command = Command::new(format!("/usr/sbin/{name}"));
    command.arg(path);
    let done = job::run(command, SOON)?;
    ensure!(done.code == Some(0), "{name} {}: {}", path.display(), done.stderr);
    Ok(())
}
