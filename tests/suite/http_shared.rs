//! Servers of WASI 0.3: instances that serve several requests side by side (`INSTANCE_REUSE`), and go on after an answer.
//!
//! Only connections of one thread of the server share an instance, so each case uses one connection of HTTP/2.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hyper::http::Method;
use tokio::task::JoinSet;

use crate::common::containerd::Containerd;
use crate::common::http::{self, Answer, Connection, Protocol};
use crate::common::site::{self, Site};
use crate::common::{Outcome, SOON, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("an_instance_serves_as_many_as_set", reused),
    ("its_requests_run_side_by_side", side_by_side),
    ("a_guest_that_fails_takes_its_instance_along", failed),
    ("a_guest_that_computes_gets_no_further_requests", computing),
    ("a_client_that_leaves_frees_the_instance", left),
    ("a_guest_goes_on_after_its_answer", after),
    ("guests_that_go_on_are_bounded", bounded),
    ("a_drain_waits_for_what_goes_on", drained),
];

fn web3<'a>(containerd: &'a Containerd, settings: &[(&str, &str)]) -> Result<Site<'a>> {
    Site::start(site::with(containerd.namespace("http").guest("/web3.wasm", &[])?, settings))
}

/// Sends these at the same time, on one connection.
async fn together(connection: &mut Connection, paths: &[&str]) -> Result<Vec<Result<Answer>>> {
    let mut answers = JoinSet::new();
    for (number, path) in paths.iter().enumerate() {
        let request = connection.request(Method::GET, path, http::empty())?;
        let answer = connection.begin(request)?;
        answers.spawn(async move { (number, answer.await) });
    }
    let mut answers = answers.join_all().await;
    answers.sort_by_key(|(number, _)| *number);
    Ok(answers.into_iter().map(|(_, answer)| answer).collect())
}

fn reused(containerd: &Containerd) -> Outcome {
    let site = web3(containerd, &[("INSTANCE_REUSE", "3"), ("INSTANCE_IDLE_TIMEOUT", "300ms")])?;
    http::block_on(async {
        let mut connection = Connection::open(site.addr, Protocol::Two).await?;
        for _ in 0..4 {
            for expected in ["1\n", "2\n", "3\n"] {
                connection.get("/static-counter").await?.expect(200, expected)?;
            }
        }
        connection.get("/static-counter").await?.expect(200, "1\n")?;
        // Nobody's, so it bears nobody's name.
        let seen = connection.get("/inspect").await?;
        ensure!(seen.status == 200 && !seen.text().contains("REQUEST_ID"), "{seen:?}");
        // Longer than it waits: what is looked for is that nothing happens to it before, and no event tells of its end.
        tokio::time::sleep(Duration::from_millis(900)).await;
        connection.get("/static-counter").await?.expect(200, "1\n")
    })?;
    site.drain("SIGTERM", 0).map(drop)
}

fn side_by_side(containerd: &Containerd) -> Outcome {
    let site = web3(containerd, &[("INSTANCE_REUSE", "1000")])?;
    http::block_on(async {
        let mut connection = Connection::open(site.addr, Protocol::Two).await?;
        for _ in 0..3 {
            let begun = Instant::now();
            for answer in together(&mut connection, &["/sleep?ms=400"; 12]).await? {
                answer?.expect(200, "slept\n")?;
            }
            ensure!(begun.elapsed() < Duration::from_millis(12 * 400 / 2), "it took {:?}", begun.elapsed());
        }
        // Twelve sleepers were one instance, which counts on.
        let mut counts = Vec::new();
        for answer in together(&mut connection, &["/static-counter"; 12]).await? {
            counts.push(answer?.text().trim().parse::<u32>()?);
        }
        counts.sort_unstable();
        ensure!(counts == (1..=12).collect::<Vec<_>>(), "{counts:?}");
        // No more than sixteen at a time: the rest has an instance of its own, and all are answered.
        for answer in together(&mut connection, &["/sleep?ms=100"; 40]).await? {
            answer?.expect(200, "slept\n")?;
        }
        Ok(())
    })?;
    site.drain("SIGTERM", 0).map(drop)
}

fn failed(containerd: &Containerd) -> Outcome {
    let site = web3(containerd, &[("INSTANCE_REUSE", "1000")])?;
    http::block_on(async {
        let mut connection = Connection::open(site.addr, Protocol::Two).await?;
        let answers = together(&mut connection, &["/sleep?ms=5000", "/sleep?ms=5000", "/trap"]).await?;
        for answer in answers {
            ensure!(answer?.status == 500);
        }
        connection.get("/static-counter").await?.expect(200, "1\n")
    })?;
    site.drain("SIGTERM", 0).map(drop)
}

/// The clock of a request runs though its guest lets nobody else in; the instance ends with the last that waits for it.
fn computing(containerd: &Containerd) -> Outcome {
    let site = web3(containerd, &[("INSTANCE_REUSE", "1000"), ("REQUEST_TIMEOUT", "1s")])?;
    http::block_on(async {
        let mut connection = Connection::open(site.addr, Protocol::Two).await?;
        connection.get("/static-counter").await?.expect(200, "1\n")?;
        let begun = Instant::now();
        for answer in together(&mut connection, &["/sleep?ms=100", "/spin", "/hello"]).await? {
            let answer = answer?;
            ensure!([200, 504].contains(&answer.status.as_u16()), "{answer:?}");
        }
        ensure!(begun.elapsed() < Duration::from_secs(3), "it took {:?}", begun.elapsed());
        connection.get("/static-counter").await?.expect(200, "1\n")
    })?;
    quiet(&site)?;
    site.drain("SIGTERM", 0).map(drop)
}

/// Nothing computes any more.
fn quiet(site: &Site<'_>) -> Outcome {
    let daemon = site.container.daemon()?;
    wait::until_true("the process to be idle", SOON, || {
        let before = proc::cpu_ticks(daemon)?;
        std::thread::sleep(Duration::from_millis(200));
        Ok(proc::cpu_ticks(daemon)? - before <= 4)
    })
}

fn left(containerd: &Containerd) -> Outcome {
    let site = web3(containerd, &[("INSTANCE_REUSE", "1000")])?;
    http::block_on(async {
        let mut connection = Connection::open(site.addr, Protocol::Two).await?;
        connection.get("/static-counter").await?.expect(200, "1\n")?;
        let leaves = connection.request(Method::GET, "/sleep?ms=600000", http::empty())?;
        let leaves = tokio::spawn(connection.begin(leaves)?);
        let stays = connection.request(Method::GET, "/sleep?ms=700", http::empty())?;
        let stays = connection.begin(stays)?;
        // Both are in one instance, which still counts.
        connection.get("/static-counter").await?.expect(200, "2\n")?;
        leaves.abort();
        stays.await?.expect(200, "slept\n")?;
        connection.get("/static-counter").await?.expect(200, "1\n")
    })?;
    // And not after ten minutes.
    let drained = site.drain("SIGTERM", 0)?;
    ensure!(drained["cut"] == "0", "{drained:?}");
    Ok(())
}

fn after(containerd: &Containerd) -> Outcome {
    for reuse in ["1", "1000"] {
        let site = web3(containerd, &[("INSTANCE_REUSE", reuse)])?;
        http::block_on(async {
            for protocol in http::BOTH {
                let mut connection = Connection::open(site.addr, protocol).await?;
                let begun = Instant::now();
                connection.get("/after?ms=700").await?.expect(200, "done\n")?;
                ensure!(begun.elapsed() < Duration::from_millis(600), "the answer came after {:?}", begun.elapsed());
                // Whether its client stays or not.
            }
            site.told("after done", 2).await
        })?;
        site.drain("SIGTERM", 0)?;
    }
    Ok(())
}

/// They count as requests do, and end as late.
fn bounded(containerd: &Containerd) -> Outcome {
    let site = web3(containerd, &[("MAX_CONCURRENT_REQUESTS", "4"), ("REQUEST_TIMEOUT", "1s")])?;
    http::block_on(async {
        let mut connection = Connection::open(site.addr, Protocol::Two).await?;
        for _ in 0..4 {
            connection.get("/after?ms=600000").await?.expect(200, "done\n")?;
        }
        ensure!(connection.get("/hello").await?.status == 503);
        let begun = Instant::now();
        while connection.get("/hello").await?.status == 503 {
            ensure!(begun.elapsed() < Duration::from_secs(5), "they never end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    })?;
    ensure!(!site.log().contains("after done"), "{}", site.log());
    site.drain("SIGTERM", 0).map(drop)
}

fn drained(containerd: &Containerd) -> Outcome {
    for reuse in ["1", "1000"] {
        let site = web3(containerd, &[("INSTANCE_REUSE", reuse)])?;
        http::block_on(async {
            let mut connection = Connection::open(site.addr, Protocol::One).await?;
            connection.get("/after?ms=1000").await?.expect(200, "done\n")
        })?;
        site.drain("SIGTERM", 0)?;
        ensure!(site.log().contains("after done"), "{:?}", site.log());
    }
    Ok(())
}
