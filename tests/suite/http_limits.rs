//! What a server allows: size and number. Whoever asks for more is told so, and costs the others nothing.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use hyper::body::Frame;
use hyper::http::{HeaderValue, Method};

use super::http_serve::{counted, serving};
use crate::common::containerd::Containerd;
use crate::common::http::{self, Answer, BOTH, Connection, End, Protocol};
use crate::common::site::{self, Site};
use crate::common::{Outcome, SOON, wait};

pub const CASES: crate::common::Cases = &[
    ("more_requests_than_allowed_are_503", overload),
    ("a_large_body_is_413", large_body),
    ("a_large_head_is_431", large_head),
    ("too_many_fields_are_431", many_fields),
    ("a_guest_that_takes_too_much_memory_is_500", memory),
];

/// Bound of what is to happen after a few hundred milliseconds, on a machine that is busy.
const PROMPT: Duration = Duration::from_secs(3);

fn overload(containerd: &Containerd) -> Outcome {
    serving(containerd, &[("MAX_CONCURRENT_REQUESTS", "2")], async |site| {
        let mut streams = Connection::open(site.addr, Protocol::Two).await?;
        let first = streams.request(Method::GET, "/sleep-after-head?ms=800", http::empty())?;
        let first = streams.send(first).await?;
        let second = tokio::spawn(http::get(site.addr, Protocol::One, "/spin?ms=800"));
        tokio::time::sleep(Duration::from_millis(100)).await;
        for protocol in BOTH {
            let mut connection = Connection::open(site.addr, protocol).await?;
            for _ in 0..3 {
                let answer = connection.get("/hello").await?;
                ensure!(answer.status == 503, "{protocol:?}: {answer:?}");
                ensure!(answer.header("retry-after") == Some("1"), "{protocol:?}: {answer:?}");
            }
        }
        Answer::of(first).await?.expect(200, "first\nsecond\n")?;
        second.await??.expect(200, "spun\n")?;
        http::get(site.addr, Protocol::One, "/hello").await?.expect(200, "hello\n")?;
        let told = site.lines().iter().filter(|line| line.contains("overload")).count();
        ensure!(told == 1, "{told} lines about the overload: {:?}", site.lines());
        Ok(())
    })
}

fn large_body(containerd: &Containerd) -> Outcome {
    serving(containerd, &SMALL_BODY, too_large)
}

pub const SMALL_BODY: [(&str, &str); 1] = [("MAX_BODY", "1000")];

/// Of WASI 0.3 as well (`http_concurrent.rs`).
pub async fn too_large(site: &Site<'_>) -> Outcome {
    for protocol in BOTH {
        let mut connection = Connection::open(site.addr, protocol).await?;
        let whole = vec![b'x'; 1000];
        connection.post("/count", whole.clone()).await?.expect(200, &counted(&whole))?;
        let answer = connection.post("/count", vec![b'x'; 1001]).await?;
        ensure!(answer.status == 413, "{protocol:?}: {answer:?}");
        in_pieces(site.addr, protocol, "/count", 2).await?.expect(200, &counted(&whole[..800]))?;
        let answer = in_pieces(site.addr, protocol, "/count", 4).await?;
        ensure!(answer.status == 413, "{protocol:?}: {answer:?}");
        // Too late for a status: the body breaks off.
        let echoed = in_pieces(site.addr, protocol, "/echo", 4).await;
        let clean = echoed.as_ref().is_ok_and(|answer| answer.status == 200);
        ensure!(!clean, "{protocol:?}: a part of the body is echoed as a whole: {echoed:?}");
        http::get(site.addr, protocol, "/hello").await?.expect(200, "hello\n")?;
    }
    Ok(())
}

/// A body of pieces of 400 bytes, without a declared length.
async fn in_pieces(addr: SocketAddr, protocol: Protocol, path: &str, pieces: usize) -> Result<Answer> {
    let mut connection = Connection::open(addr, protocol).await?;
    let (feed, body) = http::fed();
    let request = connection.request(Method::POST, path, body)?;
    let (answer, ()) = tokio::join!(connection.fetch(request), async {
        for _ in 0..pieces {
            // Who is refused stops listening.
            let _ = feed.send(Frame::data(Bytes::from(vec![b'x'; 400]))).await;
        }
        drop(feed);
    });
    answer
}

async fn with_field(addr: SocketAddr, protocol: Protocol, count: usize, length: usize) -> Result<Answer> {
    let mut connection = Connection::open(addr, protocol).await?;
    let mut request = connection.request(Method::GET, "/hello", http::empty())?;
    for number in 0..count {
        let name = hyper::http::HeaderName::try_from(format!("x-{number}"))?;
        request.headers_mut().insert(name, HeaderValue::try_from("v".repeat(length))?);
    }
    connection.fetch(request).await
}

fn large_head(containerd: &Containerd) -> Outcome {
    serving(containerd, &[("MAX_HEADER_SIZE", "8KiB")], async |site| {
        for protocol in BOTH {
            with_field(site.addr, protocol, 1, 6000).await?.expect(200, "hello\n")?;
            for (count, length) in [(1, 9000), (10, 1000)] {
                let answer = with_field(site.addr, protocol, count, length).await?;
                ensure!(answer.status == 431, "{protocol:?} {count} × {length}: {answer:?}");
            }
            // HTTP/2 ends the connection of a client that goes too far (ENHANCE_YOUR_CALM).
            let far = with_field(site.addr, protocol, 1, 60_000).await;
            let is_served = far.as_ref().is_ok_and(|answer| answer.status != 431);
            ensure!(!is_served, "{protocol:?}: {far:?}");
            http::get(site.addr, protocol, "/hello").await?.expect(200, "hello\n")?;
        }
        let line = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(9000));
        let (answer, end) = http::exchange(site.addr, line.as_bytes(), PROMPT)?;
        let text = String::from_utf8_lossy(&answer);
        ensure!(text.starts_with("HTTP/1.1 431 ") || text.starts_with("HTTP/1.1 414 "), "{text:?}");
        ensure!(end != End::Open, "{end:?}");
        Ok(())
    })
}

fn many_fields(containerd: &Containerd) -> Outcome {
    for (settings, allowed) in [(&[("MAX_HEADERS", "20")][..], 20), (&[], 100)] {
        serving(containerd, settings, async |site| {
            for protocol in BOTH {
                // HTTP/1.1 has Host besides.
                with_field(site.addr, protocol, allowed - 1, 1).await?.expect(200, "hello\n")?;
                let answer = with_field(site.addr, protocol, allowed + 1, 1).await?;
                ensure!(answer.status == 431, "{protocol:?}: {answer:?}");
                http::get(site.addr, protocol, "/hello").await?.expect(200, "hello\n")?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn memory(containerd: &Containerd) -> Outcome {
    const MIB: usize = 1 << 20;
    let run = containerd.namespace("http").guest(site::WEB, &[])?.option("--memory-limit", &(64 * MIB).to_string());
    let site = Site::start(run)?;
    http::block_on(async {
        for protocol in BOTH {
            for round in 0..3 {
                let path = format!("/alloc?bytes={}", 128 * MIB);
                let answer = http::get(site.addr, protocol, &path).await?;
                ensure!(answer.status == 500, "{protocol:?}, round {round}: {answer:?}");
                // What the one before had taken is there again, once its instance is gone: a moment after its answer.
                let path = format!("/alloc?bytes={}", 40 * MIB);
                let deadline = std::time::Instant::now() + SOON;
                let mut answer = http::get(site.addr, protocol, &path).await?;
                while answer.status == 500 && std::time::Instant::now() < deadline {
                    answer = http::get(site.addr, protocol, &path).await?;
                }
                answer.expect(200, &format!("{}\n", 40 * MIB))?;
            }
        }
        // Together they are too much, and some of them are told so.
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..6 {
            tasks.spawn(http::get(site.addr, Protocol::One, "/alloc?bytes=31457280"));
        }
        while let Some(answer) = tasks.join_next().await {
            let answer = answer??;
            ensure!([200, 500, 503].contains(&answer.status.as_u16()), "{answer:?}");
        }
        http::get(site.addr, Protocol::One, "/hello").await?.expect(200, "hello\n")
    })
    .with_context(|| format!("the container's log: {:?}", site.log()))?;
    let log = site.wait_log("/alloc: ")?;
    ensure!(log.contains("memory"), "{log:?}");
    wait::until_true("the server to live on", SOON, || Ok(site.container.status()?.as_deref() == Some("RUNNING")))
}
