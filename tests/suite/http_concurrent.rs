//! Servers of WASI 0.3 are held to the same bounds as those of 0.2: their bodies and instances go through other code.
//!
//! Each request has an instance of its own here; what shares one is in `http_shared.rs`.

use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use hyper::body::Frame;
use hyper::http::Method;

use super::http_failures::{Seen, failing};
use super::http_serve::{counted, pattern};
use crate::common::Outcome;
use crate::common::containerd::Containerd;
use crate::common::http::{self, Answer, BOTH, Connection, End, Protocol};
use crate::common::site::{self, Site};

pub const NEWEST: crate::common::Cases = &[
    ("a_slow_reader_costs_no_memory", back_pressure),
    ("a_client_that_does_not_read_is_cut", slow_reader),
    ("a_stream_whose_client_does_not_read_is_reset", slow_stream),
    ("a_large_body_is_413", large_body),
    ("a_body_that_stops_coming_is_not_waited_for", slow_body),
    ("head_has_no_body", head),
    ("an_answer_without_its_body_frees_its_place", head_of_endless),
    ("past_its_time_a_body_breaks_off", timeout_after_head),
    ("a_client_that_leaves_frees_its_place", leaves),
];

/// Bound of what is to happen after a few hundred milliseconds, on a machine that is busy.
const PROMPT: Duration = Duration::from_secs(3);

const ONE_PLACE: (&str, &str) = ("MAX_CONCURRENT_REQUESTS", "1");

/// More than all buffers on its way hold.
const LENGTH: usize = 64 << 20;

/// `web3.wasm`, and an asynchronous use of it.
fn serving(containerd: &Containerd, settings: &[(&str, &str)], act: impl AsyncFnOnce(&Site<'_>) -> Outcome) -> Outcome {
    let site = Site::start(site::with(containerd.namespace("http").guest("/web3.wasm", &[])?, settings))?;
    http::block_on(act(&site)).with_context(|| format!("the container's log: {:?}", site.log()))
}

/// Asks until the only place is free. Whoever had it before gives it back a moment after its answer.
async fn once_free(connection: &mut Connection, path: &str) -> Result<Answer> {
    let begun = Instant::now();
    loop {
        let answer = connection.get(path).await?;
        if answer.status != 503 {
            return Ok(answer);
        }
        ensure!(begun.elapsed() < PROMPT, "the place is not free after {:?}", begun.elapsed());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The only place is taken.
async fn taken(site: &Site<'_>) -> Outcome {
    let answer = http::get(site.addr, Protocol::One, "/hello").await?;
    ensure!(answer.status == 503, "the place is free too early: {answer:?}");
    Ok(())
}

fn back_pressure(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        for protocol in BOTH {
            http::get(site.addr, protocol, "/big?bytes=1000000").await?;
            let before = site.memory_kib()?;
            let mut connection = Connection::open(site.addr, protocol).await?;
            let request = connection.request(Method::GET, &format!("/big?bytes={LENGTH}"), http::empty())?;
            let unread = connection.send(request).await?;
            // Time to get as far as it can: that it gets no farther has no event.
            tokio::time::sleep(Duration::from_millis(500)).await;
            let growth = site.memory_kib()?.saturating_sub(before);
            ensure!(growth < 8 * 1024, "{protocol:?}: a reader that is slow costs {growth} KiB");
            let answer = Answer::of(unread).await?;
            ensure!(answer.body == pattern(LENGTH), "{protocol:?}: {} bytes, or others", answer.body.len());
        }
        Ok(())
    })
}

fn slow_reader(containerd: &Containerd) -> Outcome {
    serving(containerd, &[("IDLE_TIMEOUT", "500ms"), ONE_PLACE], async |site| {
        let mut stream = http::socket(site.addr)?;
        write!(stream, "GET /big?bytes={LENGTH}&say=begun HTTP/1.1\r\nHost: a\r\n\r\n")?;
        site.told("begun", 1).await?;
        taken(site).await?;
        let mut other = Connection::open(site.addr, Protocol::Two).await?;
        once_free(&mut other, "/hello").await?.expect(200, "hello\n")?;
        let (bytes, end) = http::read_all(&mut stream, PROMPT)?;
        ensure!(end != End::Open && bytes.len() < LENGTH, "{} bytes, {end:?}", bytes.len());
        Ok(())
    })
}

fn slow_stream(containerd: &Containerd) -> Outcome {
    serving(containerd, &[("IDLE_TIMEOUT", "500ms"), ONE_PLACE], async |site| {
        let mut connection = Connection::open(site.addr, Protocol::Two).await?;
        let request = connection.request(Method::GET, &format!("/big?bytes={LENGTH}"), http::empty())?;
        let unread = connection.send(request).await?;
        taken(site).await?;
        // The stream alone: its connection goes on. A slow guest is nobody's fault.
        once_free(&mut connection, "/sleep-after-head?ms=900").await?.expect(200, "first\nsecond\n")?;
        ensure!(Answer::of(unread).await.is_err(), "the body ended as if it were whole");
        Ok(())
    })
}

fn large_body(containerd: &Containerd) -> Outcome {
    serving(containerd, &[("MAX_BODY", "1000")], async |site| {
        for protocol in BOTH {
            let mut connection = Connection::open(site.addr, protocol).await?;
            let whole = vec![b'x'; 1000];
            connection.post("/count", whole.clone()).await?.expect(200, &counted(&whole))?;
            let answer = connection.post("/count", vec![b'x'; 1001]).await?;
            ensure!(answer.status == 413, "{protocol:?}: {answer:?}");
            in_pieces(site, protocol, "/count", 2).await?.expect(200, &counted(&whole[..800]))?;
            let answer = in_pieces(site, protocol, "/count", 4).await?;
            ensure!(answer.status == 413, "{protocol:?}: {answer:?}");
            // Too late for a status: the body breaks off.
            let echoed = in_pieces(site, protocol, "/echo", 4).await;
            let clean = echoed.as_ref().is_ok_and(|answer| answer.status == 200);
            ensure!(!clean, "{protocol:?}: a part of the body is echoed as a whole: {echoed:?}");
            http::get(site.addr, protocol, "/hello").await?.expect(200, "hello\n")?;
        }
        Ok(())
    })
}

/// A body of pieces of 400 bytes, without a declared length.
async fn in_pieces(site: &Site<'_>, protocol: Protocol, path: &str, pieces: usize) -> Result<Answer> {
    let mut connection = Connection::open(site.addr, protocol).await?;
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

fn slow_body(containerd: &Containerd) -> Outcome {
    serving(containerd, &[("IDLE_TIMEOUT", "500ms")], async |site| {
        for head in ["Content-Length: 100\r\n\r\n0123456789", "Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n"] {
            let request = format!("POST /count HTTP/1.1\r\nHost: a\r\n{head}");
            let begun = Instant::now();
            let (bytes, end) = http::exchange(site.addr, request.as_bytes(), PROMPT)?;
            let text = String::from_utf8_lossy(&bytes);
            ensure!(text.is_empty() || text.starts_with("HTTP/1.1 408 "), "{text:?}");
            ensure!(end != End::Open && begun.elapsed() > Duration::from_millis(400), "{end:?}, {:?}", begun.elapsed());
            // The head of this answer is out already.
            let request = format!("POST /echo HTTP/1.1\r\nHost: a\r\n{head}");
            let (bytes, end) = http::exchange(site.addr, request.as_bytes(), PROMPT)?;
            let text = String::from_utf8_lossy(&bytes);
            ensure!(text.starts_with("HTTP/1.1 200 ") && !text.ends_with("0\r\n\r\n"), "{text:?}");
            ensure!(end != End::Open, "{end:?}");
        }
        let mut streams = Connection::open(site.addr, Protocol::Two).await?;
        let (feed, body) = http::fed();
        let request = streams.request(Method::POST, "/count", body)?;
        feed.send(Frame::data("some".into())).await?;
        let answer = streams.fetch(request).await?;
        ensure!(answer.status == 408, "{answer:?}");
        // The stream alone.
        streams.get("/hello").await?.expect(200, "hello\n")
    })
}

fn head(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        for protocol in BOTH {
            let mut connection = Connection::open(site.addr, protocol).await?;
            for (path, length) in
                [("/hello", Some("6")), ("/big?bytes=300000", None), ("/big?bytes=300000&length=1", Some("300000"))]
            {
                let request = connection.request(Method::HEAD, path, http::empty())?;
                let answer = connection.fetch(request).await.context(path)?;
                answer.expect(200, "")?;
                ensure!(answer.header("content-length") == length, "{path}: {answer:?}");
                connection.get("/hello").await?.expect(200, "hello\n")?;
            }
        }
        Ok(())
    })
}

/// Nobody wants the body: its guest is told so, and does not write a terabyte for nobody.
fn head_of_endless(containerd: &Containerd) -> Outcome {
    for protocol in BOTH {
        serving(containerd, &[ONE_PLACE], async |site| {
            let mut connection = Connection::open(site.addr, protocol).await?;
            let request = connection.request(Method::HEAD, "/big?bytes=1099511627776", http::empty())?;
            connection.fetch(request).await?.expect(200, "")?;
            once_free(&mut connection, "/hello").await.with_context(|| format!("{protocol:?}"))?.expect(200, "hello\n")
        })?;
    }
    Ok(())
}

fn timeout_after_head(containerd: &Containerd) -> Outcome {
    serving(containerd, &[("REQUEST_TIMEOUT", "500ms")], async |site| {
        for path in ["/sleep-after-head?ms=60000", "/spin-after-head"] {
            let mut streams = Connection::open(site.addr, Protocol::Two).await?;
            let seen = failing(&mut streams, path).await?;
            ensure!(seen == Seen::BrokenOff, "{path}: {seen:?}");
            // The stream was reset, the connection was not.
            streams.get("/hello").await?.expect(200, "hello\n")?;
            let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
            let (bytes, end) = http::exchange(site.addr, request.as_bytes(), PROMPT)?;
            let text = String::from_utf8_lossy(&bytes);
            ensure!(text.contains("chunked") && text.ends_with("6\r\nfirst\n\r\n"), "{path}: {text:?}");
            ensure!(end != End::Open, "{path}: the connection is kept");
        }
        Ok(())
    })
}

fn leaves(containerd: &Containerd) -> Outcome {
    for (path, said) in
        [("/sleep", "begun"), ("/spin", "begun"), ("/sleep-after-head", "begun"), ("/spin-after-head", "spins")]
    {
        let path = format!("{path}?ms=60000&say=begun");
        for protocol in BOTH {
            // A server each: nobody before it can have kept the place for a moment.
            serving(containerd, &[ONE_PLACE], async |site| {
                left(site, protocol, &path, said).await.with_context(|| format!("{protocol:?} {path}"))
            })?;
        }
    }
    Ok(())
}

/// A client goes when the guest has said this.
async fn left(site: &Site<'_>, protocol: Protocol, path: &str, said: &str) -> Outcome {
    let mut streams = Connection::open(site.addr, Protocol::Two).await?;
    match protocol {
        Protocol::One => {
            let mut stream = http::socket(site.addr)?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")?;
            site.told(said, 1).await?;
            taken(site).await?;
        }
        // A stream that is given up, on a connection that stays.
        Protocol::Two => {
            let request = streams.request(Method::GET, path, http::empty())?;
            let given_up = tokio::spawn(streams.begin(request)?);
            site.told(said, 1).await?;
            taken(site).await?;
            given_up.abort();
        }
    }
    once_free(&mut streams, "/hello").await?.expect(200, "hello\n")
}
