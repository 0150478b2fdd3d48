//! How much a server takes on: connections, and requests out of the pool that all containers of a process share.
//!
//! ```text
//! 1000 instances ─▶ a container alone holds half of them ─▶ 503 for its further requests
//!                └▶ another one finds the other half
//! ```
//! The containers are in a namespace of their own, and so is their process: nobody else takes from its pool.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use hyper::Response;
use hyper::body::{Frame, Incoming};
use hyper::http::Method;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::common::Outcome;
use crate::common::containerd::Containerd;
use crate::common::http::{self, Answer, BOTH, Connection, Protocol};
use crate::common::site::{self, Site};

pub const CASES: crate::common::Cases = &[
    ("further_connections_wait_for_a_place", connections),
    ("the_older_spelling_of_the_backlog_is_hidden_too", older_spelling),
];

/// About the process, whoever started it.
pub const NEWEST: crate::common::Cases =
    &[("hundreds_of_requests_run_at_once", burst), ("a_container_leaves_half_of_the_pool_to_others", pool)];

const NAMESPACE: &str = "capacity";

/// Above what the pool gives anybody: it decides, and not the container's own limit.
const GREEDY: (&str, &str) = ("MAX_CONCURRENT_REQUESTS", "1000");

fn connections(containerd: &Containerd) -> Outcome {
    let site = site::web(&containerd.namespace(NAMESPACE), &[("MAX_CONNECTIONS", "2")])?;
    http::block_on(async {
        for protocol in BOTH {
            let mut held = Vec::new();
            for _ in 0..2 {
                let mut connection = Connection::open(site.addr, protocol).await?;
                connection.get("/hello").await?.expect(200, "hello\n")?;
                held.push(connection);
            }
            // The kernel takes it.
            let mut third = Connection::open(site.addr, protocol).await?;
            let mut answer = tokio::spawn(async move { third.get("/hello").await });
            let early = tokio::time::timeout(Duration::from_millis(300), &mut answer).await;
            ensure!(early.is_err(), "{protocol:?}: a third one is served beside two: {early:?}");
            held.pop();
            answer.await??.expect(200, "hello\n").with_context(|| format!("{protocol:?}"))?;
        }
        Ok(())
    })
}

fn older_spelling(containerd: &Containerd) -> Outcome {
    const OLDER: &str = "WASMTIME_HTTP_BACKLOG";
    let client = containerd.namespace(NAMESPACE);
    let run = |value| {
        let run = client.guest(site::WEB, &[])?.option("--env", "COLOUR=red");
        anyhow::Ok(run.option("--env", &format!("{OLDER}={value}")))
    };
    let site = Site::start(run("7")?)?;
    http::block_on(async {
        let mut connection = Connection::open(site.addr, Protocol::One).await?;
        let seen = connection.get("/inspect").await?.text();
        ensure!(seen.contains("COLOUR") && !seen.contains("WASMTIME"), "{seen}");
        connection.get("/config?key=COLOUR").await?.expect(200, "red\n")?;
        connection.get(&format!("/config?key={OLDER}")).await?.expect(404, "no such key\n")
    })?;
    // It is a setting, and no variable that merely vanishes.
    site::anywhere(run("-1")?).expect_error(OLDER)
}

/// They come all together, as `pool`'s do not.
fn burst(containerd: &Containerd) -> Outcome {
    const EACH: usize = 150;
    let site = site::web(&containerd.namespace(NAMESPACE), &[GREEDY])?;
    http::block_on(async {
        let (mut connections, mut answers) = (Vec::new(), JoinSet::new());
        // A connection has 250 streams.
        for _ in 0..3 {
            let mut connection = Connection::open(site.addr, Protocol::Two).await?;
            for _ in 0..EACH {
                let request = connection.request(Method::GET, "/sleep?ms=2000", http::empty())?;
                answers.spawn(connection.begin(request)?);
            }
            connections.push(connection);
        }
        while let Some(answer) = answers.join_next().await {
            answer??.expect(200, "slept\n")?;
        }
        Ok(())
    })?;
    let drained = site.drain("SIGTERM", 0)?;
    ensure!(drained["cut"] == "0", "{drained:?}");
    Ok(())
}

/// A request in flight: its guest has begun to answer, and gets the rest of its body from here.
type Held = (mpsc::Sender<Frame<Bytes>>, Response<Incoming>);

async fn hold(connection: &mut Connection) -> Result<Held> {
    let (feed, body) = http::fed();
    let request = connection.request(Method::POST, "/echo", body)?;
    Ok((feed, connection.send(request).await?))
}

/// One after the other, so that it is known to which of them the last instance goes.
fn pool(containerd: &Containerd) -> Outcome {
    const INSTANCES: usize = 1000;
    const EACH: usize = 200;
    let client = containerd.namespace(NAMESPACE);
    let (site, other) = (site::web(&client, &[GREEDY])?, site::web(&client, &[])?);
    ensure!(site.container.daemon()? == other.container.daemon()?, "they have a process each");
    http::block_on(async {
        let (mut connections, mut held, mut refused) = (Vec::new(), Vec::new(), 0);
        for _ in 0..3 {
            let mut connection = Connection::open(site.addr, Protocol::Two).await?;
            for _ in 0..EACH {
                let (feed, response) = hold(&mut connection).await?;
                if response.status() == 200 {
                    ensure!(refused == 0, "one gets in after {refused} were refused");
                    held.push((feed, response));
                } else {
                    let answer = Answer::of(response).await?;
                    ensure!(answer.status == 503 && answer.header("retry-after") == Some("1"), "{answer:?}");
                    refused += 1;
                }
            }
            connections.push(connection);
        }
        ensure!(held.len() == INSTANCES / 2, "{} run, {refused} are refused", held.len());
        for number in 0..20 {
            http::get(other.addr, BOTH[number % 2], "/hello").await?.expect(200, "hello\n")?;
        }
        // All of them are there to the end.
        for (number, (feed, response)) in held.into_iter().enumerate() {
            feed.send(Frame::data(number.to_string().into())).await?;
            drop(feed);
            Answer::of(response).await?.expect(200, &number.to_string())?;
        }
        http::get(site.addr, Protocol::One, "/hello").await?.expect(200, "hello\n")
    })?;
    site.drain("SIGTERM", 0).map(drop)
}
