//! Nothing of one request is to be found by another: not in memory, not in what the host tells it.
//!
//! The guest fills its memory with a secret (statics, heap, stack), and a later one looks at every byte of its own. Slots
//! of memory pass from request to request and, in one process, from container to container. So do tables, which another
//! guest fills with functions.

use std::collections::HashSet;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use hyper::http::{HeaderName, HeaderValue, Method};
use tokio::task::JoinSet;

use super::http_serve::serving;
use crate::common::Outcome;
use crate::common::containerd::Containerd;
use crate::common::http::{self, BOTH, Connection};
use crate::common::site::{self, Site};

pub const CASES: crate::common::Cases = &[
    ("no_memory_passes_to_another_request", memory),
    ("memory_that_grows_is_empty", growth),
    ("no_table_passes_to_another_request", tables),
    ("a_reused_instance_shows_that_the_search_finds", proof),
    ("headers_and_ids_are_a_requests_own", heads),
    ("environments_are_a_containers_own", environments),
];

pub const BOUNDS_CHECKS: [&str; 2] = ["explicit", "guarded"];

/// The guest that says with its status what it found in its table.
pub const TABLE: &str = "/table.wasm";

/// Of no other client, and not made of bytes that any program has.
fn secret(number: usize) -> String {
    let seed = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    format!("{seed:016x}!{:016x}?{number}", seed.rotate_left(29) ^ 0x5bd1_e995_a5a5_5a5a)
}

/// Two containers that share a process and with it the slots.
fn together<'a>(containerd: &'a Containerd, bounds_checks: &str, reuse: [&str; 2]) -> Result<[Site<'a>; 2]> {
    let client = containerd.namespace("http");
    let start = |reuse| site::web(&client, &[("BOUNDS_CHECKS", bounds_checks), ("INSTANCE_REUSE", reuse)]);
    let sites = [start(reuse[0])?, start(reuse[1])?];
    ensure!(sites[0].container.daemon()? == sites[1].container.daemon()?, "they have a process each");
    Ok(sites)
}

fn memory(containerd: &Containerd) -> Outcome {
    const CLIENTS: usize = 4;
    const ROUNDS: usize = 4;
    for bounds_checks in BOUNDS_CHECKS {
        let sites = together(containerd, bounds_checks, ["1", "1"])?;
        let addrs = [sites[0].addr, sites[1].addr];
        http::block_on(async {
            let mut clients = JoinSet::new();
            for number in 0..CLIENTS {
                clients.spawn(remember_and_search(addrs, number * ROUNDS..(number + 1) * ROUNDS));
            }
            while let Some(client) = clients.join_next().await {
                client?.context(bounds_checks)?;
            }
            // And afterwards, whatever slot it is.
            for number in 0..CLIENTS * ROUNDS {
                search(addrs[number % 2], number).await?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Leaves secrets in one container, and looks for them in both.
async fn remember_and_search(addrs: [SocketAddr; 2], numbers: std::ops::Range<usize>) -> Outcome {
    for number in numbers {
        let mut connection = Connection::open(addrs[number % 2], BOTH[number / 2 % 2]).await?;
        connection.post("/remember", secret(number)).await?.expect(200, "ok\n")?;
        for addr in addrs {
            search(addr, number).await?;
        }
    }
    Ok(())
}

async fn search(addr: SocketAddr, number: usize) -> Outcome {
    let mut connection = Connection::open(addr, BOTH[number % 2]).await?;
    connection.post("/search", secret(number)).await?.expect(200, "found 0\n").with_context(|| secret(number))
}

/// A secret may lie beyond where the next instance's memory ends at first. An instance that serves four requests counts
/// itself, grows, looks and counts again: what it counts says whether it was the same one.
fn growth(containerd: &Containerd) -> Outcome {
    for bounds_checks in BOUNDS_CHECKS {
        let [leaves, looks] = together(containerd, bounds_checks, ["1", "4"])?;
        http::block_on(async {
            let mut looking = Connection::open(looks.addr, BOTH[0]).await?;
            let mut grown = 0;
            for number in 100..108 {
                let mut leaving = Connection::open(leaves.addr, BOTH[number % 2]).await?;
                leaving.post("/remember", secret(number)).await?.expect(200, "ok\n")?;
                looking.get("/static-counter").await?;
                looking.get("/alloc?bytes=6000000").await?.expect(200, "6000000\n")?;
                looking.post("/search", secret(number)).await?.expect(200, "found 0\n").context(bounds_checks)?;
                // An instance that is not back in time serves no other.
                grown += usize::from(looking.get("/static-counter").await?.text() == "2\n");
            }
            ensure!(grown > 0, "{bounds_checks}: no instance looked at what it had grown");
            Ok(())
        })?;
    }
    Ok(())
}

/// Each request finds its table as the program has it, and leaves it larger and full. Where one instance serves two, the
/// second says so.
fn tables(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("http");
    for bounds_checks in BOUNDS_CHECKS {
        let start = |reuse| {
            let settings = [("BOUNDS_CHECKS", bounds_checks), ("INSTANCE_REUSE", reuse)];
            Site::start(site::with(client.guest(TABLE, &[])?, &settings))
        };
        let (fresh, reused) = (start("1")?, start("2")?);
        http::block_on(async {
            let mut clients = JoinSet::new();
            for number in 0..4 {
                let addr = fresh.addr;
                clients.spawn(async move {
                    let mut connection = Connection::open(addr, BOTH[number % 2]).await?;
                    for _ in 0..25 {
                        connection.get("/").await?.expect(200, "")?;
                    }
                    anyhow::Ok(())
                });
            }
            while let Some(client) = clients.join_next().await {
                client?.context(bounds_checks)?;
            }
            let mut connection = Connection::open(reused.addr, BOTH[0]).await?;
            let mut found = 0;
            // An instance that is not back in time serves no other.
            for _ in 0..10 {
                let answer = connection.get("/").await?;
                ensure!([200, 411].contains(&answer.status.as_u16()), "{bounds_checks}: {answer:?}");
                found += usize::from(answer.status == 411);
            }
            ensure!(found > 0, "{bounds_checks}: no instance saw what it had left itself");
            // In the slots that these have left.
            http::get(fresh.addr, BOTH[1], "/").await?.expect(200, "").context(bounds_checks)
        })?;
    }
    Ok(())
}

/// The same search does find what is there.
fn proof(containerd: &Containerd) -> Outcome {
    for bounds_checks in BOUNDS_CHECKS {
        serving(containerd, &[("INSTANCE_REUSE", "2"), ("BOUNDS_CHECKS", bounds_checks)], async |site| {
            let mut connection = Connection::open(site.addr, BOTH[0]).await?;
            let mut most = 0;
            // An instance may come back only after its answer is out, and then the next request has a fresh one.
            for number in 200..210 {
                connection.post("/remember", secret(number)).await?.expect(200, "ok\n")?;
                let found = connection.post("/search", secret(number)).await?.text();
                most = most.max(found.trim().strip_prefix("found ").context(found.clone())?.parse::<usize>()?);
            }
            // 4 MiB of heap alone hold so many.
            ensure!(most > (4 << 20) / secret(200).len() - 10, "{bounds_checks}: found {most}");
            Ok(())
        })?;
    }
    Ok(())
}

/// What the guest says that it was told, as text.
async fn inspect(connection: &mut Connection, number: usize) -> Result<String> {
    let mut request = connection.request(Method::GET, &format!("/inspect?of={number}"), http::empty())?;
    let name = HeaderName::try_from(format!("x-of-{number}-only"))?;
    request.headers_mut().insert(name, HeaderValue::try_from(secret(number))?);
    let answer = connection.fetch(request).await?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(answer.text())
}

/// Also with instances that serve many requests.
fn heads(containerd: &Containerd) -> Outcome {
    const EACH: usize = 25;
    for reuse in ["1", "50"] {
        serving(containerd, &[("INSTANCE_REUSE", reuse)], async |site| {
            let mut clients = JoinSet::new();
            for client in 0..6 {
                let addr = site.addr;
                clients.spawn(async move {
                    let mut connection = Connection::open(addr, BOTH[client % 2]).await?;
                    let mut ids = Vec::new();
                    for number in client * EACH..(client + 1) * EACH {
                        ids.push(own(&inspect(&mut connection, number).await?, number)?);
                    }
                    anyhow::Ok(ids)
                });
            }
            let mut ids = HashSet::new();
            while let Some(client) = clients.join_next().await {
                ids.extend(client??);
            }
            ensure!(ids.len() == 6 * EACH, "{} ids of {} requests", ids.len(), 6 * EACH);
            Ok(())
        })?;
    }
    Ok(())
}

/// Nobody else's header; tells the request's id.
fn own(text: &str, number: usize) -> Result<String> {
    ensure!(text.contains(&secret(number)) && text.contains(&format!("of={number}\"")), "{number}: {text}");
    ensure!(text.matches("x-of-").count() == 1, "{number} sees another's header: {text}");
    let (_, id) = text.split_once(r#""REQUEST_ID":""#).context("no id")?;
    Ok(id.split('"').next().unwrap_or_default().to_owned())
}

fn environments(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("http");
    let start = |name: &str| {
        Site::start(client.guest(site::WEB, &[])?.option("--env", &format!("{name}={}", secret(name.len()))))
    };
    let sites = [start("ONE")?, start("OTHER")?];
    ensure!(sites[0].container.daemon()? == sites[1].container.daemon()?, "they have a process each");
    http::block_on(async {
        for number in 0..10 {
            for (site, own, other) in [(&sites[0], 3, 5), (&sites[1], 5, 3)] {
                let mut connection = Connection::open(site.addr, BOTH[number % 2]).await?;
                let answer = connection.get("/inspect").await?.text();
                ensure!(answer.contains(&secret(own)) && !answer.contains(&secret(other)), "{answer}");
                // Its settings are the host's own affair.
                ensure!(!answer.contains(site::PREFIX), "{answer}");
            }
        }
        Ok(())
    })
}
