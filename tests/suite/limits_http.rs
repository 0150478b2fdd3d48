//! CPU quotas and memory limits of servers: one for all requests of a container, and none of its neighbours' business.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hyper::Method;
use serde_json::json;

use super::limits::expect_rate;
use crate::common::api::Api;
use crate::common::containerd::Containerd;
use crate::common::http::{self, Connection, Protocol, empty};
use crate::common::machine::undisturbed;
use crate::common::site::{self, Site, WEB};
use crate::common::usage::Usage;
use crate::common::{Outcome, SOON, proc};

pub const CASES: crate::common::Cases = &[
    ("all_requests_share_a_quota", shared),
    ("waiting_for_cpu_time_counts_against_the_deadline", deadline),
    ("a_throttled_server_is_ended_at_once", ended),
    ("cpu_time_of_requests_adds_up", adds_up),
    ("a_memory_limit_changes_under_a_server", memory),
];

const LONG: Duration = Duration::from_secs(2);
const MIB: u64 = 1 << 20;

fn site<'a>(api: &Api<'a>, cpus: &str, settings: &[(&str, &str)]) -> Result<Site<'a>> {
    let run = api.client.guest(WEB, &[])?;
    let run = if cpus.is_empty() { run } else { run.option("--cpus", cpus) };
    Site::start(site::with(run, settings))
}

/// Sends so many requests that compute without end; they are given up with the returned connections.
async fn busy(site: &Site<'_>, count: usize) -> Result<Vec<tokio::task::JoinHandle<Result<u16>>>> {
    let mut busy = Vec::new();
    for _ in 0..count {
        let mut connection = Connection::open(site.addr, Protocol::One).await?;
        busy.push(tokio::spawn(async move {
            let request = connection.request(Method::GET, "/spin", empty())?;
            Ok(connection.send_within(Duration::from_secs(60), request).await?.status().as_u16())
        }));
    }
    Ok(busy)
}

async fn usage(api: &Api<'_>, site: &Site<'_>) -> Result<Usage> {
    // The client has a runtime of its own, which cannot run inside of another.
    tokio::task::block_in_place(|| api.usage(&site.container.id))
}

fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(work)
}

fn shared(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "limits-http")?;
    let (limited, healthy) = (site(&api, "0.2", &[])?, site(&api, "", &[])?);
    ensure!(limited.container.daemon()? == healthy.container.daemon()?, "they are not neighbours");
    undisturbed(|| block_on(beside(&api, &limited, &healthy)))?;
    limited.drain("SIGTERM", 0)?;
    healthy.drain("SIGTERM", 0)?;
    Ok(())
}

/// One container's requests spin under a quota of 0.2, and the other one answers.
async fn beside(api: &Api<'_>, limited: &Site<'_>, healthy: &Site<'_>) -> Outcome {
    let busy = busy(limited, 6).await?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = usage(api, limited).await?;
    let (mut times, begin) = (Vec::new(), Instant::now());
    while begin.elapsed() < LONG {
        let sent = Instant::now();
        http::get(healthy.addr, Protocol::One, "/").await?.expect(200, "hello\n")?;
        times.push(sent.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let after = usage(api, limited).await?;
    expect_rate(0.2, after.cores_since(&before))?;
    ensure!(after.throttled_periods > before.throttled_periods + 10, "{after:?}");
    times.sort_unstable();
    ensure!(times[times.len() / 2] < Duration::from_millis(50), "its neighbour answers in {times:?}");
    // The one beside it: little, and never throttled.
    let other = usage(api, healthy).await?;
    ensure!(other.throttled_periods == 0 && other.cpu < Duration::from_secs(1), "{other:?}");
    busy.iter().for_each(tokio::task::JoinHandle::abort);
    Ok(())
}

fn deadline(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "limits-http")?;
    let site = site(&api, "0.05", &[("REQUEST_TIMEOUT", "2s")])?;
    block_on(async {
        let begin = Instant::now();
        for request in busy(&site, 4).await? {
            ensure!(request.await?? == 504);
        }
        let took = begin.elapsed();
        ensure!((Duration::from_millis(1900)..Duration::from_millis(2600)).contains(&took), "{took:?}");
        Ok(())
    })?;
    // Nobody is there who would wait, and what is owed is little.
    http::block_on(async { http::get(site.addr, Protocol::Two, "/").await?.expect(200, "hello\n") })?;
    site.drain("SIGTERM", 0).map(drop)
}

fn ended(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "limits-http")?;
    let run = api.client.guest(WEB, &[])?.option("--cpu-quota", "1000").option("--cpu-period", "1000000");
    let site = Site::start(run)?;
    block_on(async {
        let busy = busy(&site, 3).await?;
        let begin = Instant::now();
        while usage(&api, &site).await?.throttled_periods == 0 {
            ensure!(begin.elapsed() < SOON, "it is never throttled");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let (exit, took) = tokio::task::block_in_place(|| site.container.kill_and_wait("SIGKILL"))?;
        ensure!(exit.exit_code() == 137 && took < Duration::from_millis(500), "{exit:?} after {took:?}");
        for request in busy {
            ensure!(!matches!(request.await?, Ok(200)), "it was served");
        }
        Ok(())
    })
}

/// Of requests that compute, nearly everything is the guest's.
fn adds_up(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "adds-up-http")?;
    let site = site(&api, "", &[])?;
    let daemon = site.container.daemon()?;
    for path in ["/hash?rounds=4000", "/hash?rounds=5"] {
        // Its code and its instance are warm then.
        http::block_on(async { http::get(site.addr, Protocol::One, "/hash?rounds=1").await.map(drop) })?;
        let (ticks, before) = (proc::cpu_ticks(daemon)?, api.usage(&site.container.id)?);
        http::block_on(async {
            let mut connection = Connection::open(site.addr, Protocol::One).await?;
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_secs(1) {
                let request = connection.request(Method::GET, path, empty())?;
                ensure!(connection.fetch(request).await?.status == 200);
            }
            Ok(())
        })?;
        let (after, ticks) = (api.usage(&site.container.id)?, proc::cpu_ticks(daemon)? - ticks);
        let (own, process) = ((after.cpu - before.cpu).as_secs_f64(), ticks as f64 / 100.0);
        ensure!(process > 0.2, "{path}: the process took {process} s only");
        ensure!(
            (own - process).abs() < process * 0.15 + 0.03,
            "{path}: guests took {own} s, their process {process} s"
        );
    }
    let usage = api.usage(&site.container.id)?;
    ensure!(usage.memory_peak > 0 && usage.memory_limit == u64::MAX, "{usage:?}");
    site.drain("SIGTERM", 0).map(drop)
}

fn memory(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "limits-http")?;
    let run = api.client.guest(WEB, &[])?.option("--memory-limit", &(16 * MIB).to_string());
    let site = Site::start(run)?;
    let alloc = || -> Result<u16> {
        let path = format!("/alloc?bytes={}", 32 * MIB);
        let answer = http::block_on(async { http::get(site.addr, Protocol::One, &path).await })?;
        Ok(answer.status.as_u16())
    };
    for (limit, status) in [(16 * MIB, 500), (64 * MIB, 200), (16 * MIB, 500)] {
        api.update(&site.container.id, &json!({ "memory": { "limit": limit } })).context("update")?;
        let answered = alloc()?;
        ensure!(answered == status, "{answered} within {limit} bytes");
        ensure!(api.usage(&site.container.id)?.memory_limit == limit);
    }
    site.drain("SIGTERM", 0).map(drop)
}
