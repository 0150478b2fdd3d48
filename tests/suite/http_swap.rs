//! Servers on a machine that swaps: a page that is not in memory escapes the scan for written ones, so instances are
//! cleaned another way there.
//!
//! The cases change the machine for as long as they run, so they are for one version only. Where swap is on already it
//! stays as it is. Where nobody may switch it on (inside a container, say) they are ignored, and the run says so.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::http_isolation::{BOUNDS_CHECKS, TABLE};
use crate::common::containerd::Containerd;
use crate::common::http::{self, Protocol};
use crate::common::site::{self, Site};
use crate::common::{Outcome, SOON, base, job, proc, wait};

pub const NEWEST: crate::common::Cases =
    &[("swap_changes_how_instances_are_cleaned", changed), ("nothing_is_found_of_what_was_swapped_out", swapped_out)];

/// Bytes: more than the requests below write.
const SIZE: u64 = 128 << 20;
const SECRET: &str = "seen by nobody else, whatever the kernel does";

/// Whether the machine lets us: asked once, before the cases are made.
pub fn is_possible() -> bool {
    match Swap::on() {
        Ok(_) => true,
        Err(error) => {
            eprintln!("swap cannot be switched on here, so the cases about it are ignored: {error:#}");
            false
        }
    }
}

async fn visit(addr: std::net::SocketAddr, path: &str, expected: &str) -> Outcome {
    let mut client = http::Connection::open(addr, Protocol::One).await?;
    client.post(path, SECRET).await?.expect(200, expected)
}

fn changed(containerd: &Containerd) -> Outcome {
    let offset = containerd.log_length();
    let client = containerd.namespace("swap");
    let mut sites = Vec::new();
    for bounds_checks in BOUNDS_CHECKS {
        let settings = [("BOUNDS_CHECKS", bounds_checks)];
        let table = Site::start(site::with(client.guest(TABLE, &[])?, &settings))?;
        sites.push((bounds_checks, site::web(&client, &settings)?, table));
    }
    let remember_and_search = || {
        http::block_on(async {
            for (bounds_checks, web, table) in &sites {
                visit(web.addr, "/remember", "ok\n").await?;
                visit(web.addr, "/search", "found 0\n").await.context(*bounds_checks)?;
                http::get(table.addr, Protocol::One, "/").await?.expect(200, "").context(*bounds_checks)?;
            }
            Ok(())
        })
    };
    remember_and_search()?;
    let _swap = Swap::on()?;
    wait::until_true("the daemon to notice the swap", SOON, || {
        Ok(containerd.whole_log_since(offset).contains("cleaned by remapping"))
    })?;
    // The programs have moved to other pools: they serve as before, and forget as before.
    for _ in 0..20 {
        remember_and_search()?;
    }
    sites.iter().flat_map(|(_, web, table)| [web, table]).try_for_each(|site| site.drain("SIGTERM", 0).map(drop))
}

fn swapped_out(containerd: &Containerd) -> Outcome {
    let _swap = Swap::on()?;
    BOUNDS_CHECKS.into_iter().try_for_each(|bounds_checks| {
        let site = site::web(&containerd.namespace("swapped"), &[("BOUNDS_CHECKS", bounds_checks)])?;
        page_out_and_search(&site).context(bounds_checks)?;
        site.drain("SIGTERM", 0).map(drop)
    })
}

/// Everything that requests in flight have written leaves memory; then they end, and others get their slots.
fn page_out_and_search(site: &Site<'_>) -> Outcome {
    const HOLDERS: usize = 8;
    let daemon = site.container.daemon()?;
    for round in 1..=3 {
        http::block_on(async {
            let mut holders = tokio::task::JoinSet::new();
            for _ in 0..HOLDERS {
                holders.spawn(visit(site.addr, "/remember?ms=2000", "ok\n"));
            }
            site.told("remembered", round * HOLDERS).await?;
            proc::page_out(daemon)?;
            let out = proc::swapped_kib(daemon)?;
            // 4 MiB of heap each, of which the kernel may keep some: a page that is in use just then, say.
            ensure!(out > HOLDERS as u64 * (2 << 10), "only {out} KiB are swapped out");
            while let Some(holder) = holders.join_next().await {
                holder??;
            }
            for _ in 0..2 * HOLDERS {
                visit(site.addr, "/search", "found 0\n").await?;
            }
            anyhow::Ok(())
        })?;
    }
    Ok(())
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
