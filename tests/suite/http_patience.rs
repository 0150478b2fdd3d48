//! How long a server waits: for a guest, for a client that sends or reads slowly or not at all, for one that has left.
//!
//! What is `pub` is asked of servers of WASI 0.3 as well (`http_concurrent.rs`).

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Frame;
use hyper::http::Method;

use super::http_failures::{Seen, failing};
use super::http_serve::serving;
use crate::common::containerd::Containerd;
use crate::common::http::{self, Answer, BOTH, Connection, End, Protocol};
use crate::common::site::{self, Site};
use crate::common::{Outcome, SOON, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("a_request_that_takes_too_long_is_504", timeout),
    ("past_its_time_a_body_breaks_off", timeout_after_head),
    ("past_its_time_an_answer_that_is_read_slowly_breaks_off", timeout_of_reader),
    ("a_slow_head_is_not_waited_for", slow_head),
    ("a_body_that_stops_coming_is_not_waited_for", slow_body),
    ("a_client_that_does_not_read_is_cut", |containerd| serving(containerd, &STALLED, reader_stalls)),
    ("a_stream_whose_client_does_not_read_is_reset", |containerd| serving(containerd, &STALLED, stream_stalls)),
    ("an_idle_connection_is_closed", idle),
    ("a_connection_that_rests_is_not_hurried", rests),
    ("a_client_that_leaves_frees_its_place", leaves),
    ("a_client_that_leaves_unread_input_frees_its_place", leaves_unread),
];

pub const NEWEST: crate::common::Cases = &[("five_hundred_slow_clients_harm_nobody", many_slow_heads)];

/// Bound of what is to happen after a few hundred milliseconds, on a machine that is busy.
const PROMPT: Duration = Duration::from_secs(3);

pub const ONE_PLACE: (&str, &str) = ("MAX_CONCURRENT_REQUESTS", "1");
/// For `breaks_off`, for `body_stops`, and for `reader_stalls` and `stream_stalls`.
pub const SHORT: [(&str, &str); 1] = [("REQUEST_TIMEOUT", "500ms")];
pub const IMPATIENT: [(&str, &str); 1] = [("IDLE_TIMEOUT", "500ms")];
pub const STALLED: [(&str, &str); 2] = [("IDLE_TIMEOUT", "500ms"), ONE_PLACE];

/// More than all buffers on its way hold.
const LENGTH: usize = 64 << 20;

fn timeout(containerd: &Containerd) -> Outcome {
    let settings = [("REQUEST_TIMEOUT", "500ms")];
    let third = containerd.namespace("http").guest("/web3.wasm", &[])?;
    for site in [site::web(&containerd.namespace("http"), &settings)?, Site::start(site::with(third, &settings))?] {
        http::block_on(async {
            let mut tasks = tokio::task::JoinSet::new();
            for protocol in BOTH {
                for path in ["/sleep?ms=60000", "/spin"] {
                    let addr = site.addr;
                    tasks.spawn(async move {
                        let begun = Instant::now();
                        let answer = http::get(addr, protocol, path).await?;
                        anyhow::Ok((answer, begun.elapsed()))
                    });
                }
            }
            // They are no reason to wait for anybody else.
            tokio::time::sleep(Duration::from_millis(100)).await;
            let begun = Instant::now();
            http::get(site.addr, Protocol::One, "/hello").await?.expect(200, "hello\n")?;
            ensure!(begun.elapsed() < Duration::from_millis(400), "it took {:?}", begun.elapsed());
            while let Some(task) = tasks.join_next().await {
                let (answer, took) = task??;
                ensure!(answer.status == 504, "{answer:?}");
                ensure!(took > Duration::from_millis(450) && took < PROMPT, "504 after {took:?}");
            }
            http::get(site.addr, Protocol::Two, "/hello").await?.expect(200, "hello\n")
        })?;
        wait::until_true("four lines about timeouts", SOON, || {
            let is_one = |line: &&str| line.starts_with("request ") && line.ends_with("timed out");
            Ok(site.log().lines().filter(is_one).count() == 4)
        })
        .with_context(|| format!("the container's log: {:?}", site.log()))?;
    }
    Ok(())
}

fn timeout_after_head(containerd: &Containerd) -> Outcome {
    serving(containerd, &SHORT, breaks_off)
}

pub async fn breaks_off(site: &Site<'_>) -> Outcome {
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
}

/// Its guest has ended long before, and the client reads in time for every other limit.
fn timeout_of_reader(containerd: &Containerd) -> Outcome {
    const LENGTH: usize = 900_000;
    serving(containerd, &[("REQUEST_TIMEOUT", "500ms"), ONE_PLACE], async |site| {
        let mut slow = Connection::open_narrow(site.addr, 1000).await?;
        let request = slow.request(Method::GET, &format!("/big?bytes={LENGTH}"), http::empty())?;
        let mut body = slow.send(request).await?.into_body();
        let (begun, mut read) = (Instant::now(), 0);
        while let Some(Ok(frame)) = http::soon("a piece", async { anyhow::Ok(body.frame().await) }).await? {
            read += frame.data_ref().map_or(0, Bytes::len);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        ensure!(read < LENGTH && begun.elapsed() < 2 * PROMPT, "{read} bytes in {:?}", begun.elapsed());
        free(site.addr).await?;
        ensure!(site.log().contains("/big: the request timed out"), "{:?}", site.log());
        Ok(())
    })
}

/// Waits for the end of a connection that says `bytes` every now and then. Tells what came, and how long it took.
fn trickle(mut stream: TcpStream, bytes: &[u8]) -> Result<(Vec<u8>, Duration)> {
    let begun = Instant::now();
    let mut answer = Vec::new();
    while begun.elapsed() < PROMPT {
        let sent = stream.write_all(bytes);
        let (more, end) = http::read_all(&mut stream, Duration::from_millis(50))?;
        answer.extend_from_slice(&more);
        if end != End::Open || sent.is_err() {
            return Ok((answer, begun.elapsed()));
        }
    }
    anyhow::bail!("after {PROMPT:?} the connection is open; it said {:?}", String::from_utf8_lossy(&answer))
}

fn slow_head(containerd: &Containerd) -> Outcome {
    let settings = [("HEADER_TIMEOUT", "400ms"), ("IDLE_TIMEOUT", "20s")];
    let site = &site::web(&containerd.namespace("http"), &settings)?;
    let mut h2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    h2.extend_from_slice(&[0, 0, 0, 4, 0, 0, 0, 0, 0]);
    // HEADERS without END_HEADERS: its CONTINUATION never comes.
    let h2_head = [&h2[..], &[0, 0, 1, 1, 1, 0, 0, 0, 1, 0x82]].concat();
    let served = b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n";
    let slow = [
        ("nothing", &b""[..], &b""[..]),
        ("a part of a line", b"GET /he", b""),
        ("a head without its end", b"GET /hello HTTP/1.1\r\nHost: a\r\n", b""),
        ("a head that grows", b"GET /hello HTTP/1.1\r\nHost: a\r\n", b"x: y\r\n"),
        ("a line that grows", b"GET /", b"a"),
        ("a part of the preface", b"PR", b""),
        ("a preface without its end", &b"PRI * HTTP/2.0\r\n\r\n"[..], b""),
        ("no stream", &h2, b""),
        ("a head of HTTP/2 without its end", &h2_head, b""),
    ];
    std::thread::scope(|scope| {
        let clients = slow.map(|(what, first, more)| {
            scope.spawn(move || {
                let mut stream = http::socket(site.addr)?;
                stream.write_all(first)?;
                let (answer, took) = trickle(stream, more).with_context(|| what.to_owned())?;
                ensure!(took > Duration::from_millis(250), "{what}: closed after {took:?}");
                ensure!(!answer.starts_with(b"HTTP/1.1 200"), "{what}: {:?}", String::from_utf8_lossy(&answer));
                Ok(())
            })
        });
        clients.into_iter().try_for_each(|client| client.join().ok().context("the thread")?)
    })?;
    // The second request of a connection has no more time than the first.
    let mut stream = http::socket(site.addr)?;
    stream.write_all(served)?;
    let (answer, end) = http::read_all(&mut stream, Duration::from_millis(700))?;
    ensure!(answer.starts_with(b"HTTP/1.1 200") && end == End::Open, "an idle connection has more time: {end:?}");
    stream.write_all(b"GET /he")?;
    trickle(stream, b"l").context("a second head")?;
    http::block_on(http::get(site.addr, Protocol::One, "/hello"))?.expect(200, "hello\n")
}

fn many_slow_heads(containerd: &Containerd) -> Outcome {
    const SLOW: usize = 500;
    let site = site::web(&containerd.namespace("http"), &[("HEADER_TIMEOUT", "1500ms")])?;
    http::block_on(http::get(site.addr, Protocol::One, "/hello"))?.expect(200, "hello\n")?;
    let before = site.memory_kib()?;
    let mut slow = Vec::new();
    for number in 0..SLOW {
        let mut stream = http::socket(site.addr)?;
        let head: &[u8] =
            if number % 2 == 0 { b"GET /hello HTTP/1.1\r\nHost: a\r\nX: " } else { b"PRI * HTTP/2.0\r\n" };
        stream.write_all(head)?;
        slow.push(stream);
    }
    let mut slowest = Duration::ZERO;
    http::block_on(async {
        for number in 0..20 {
            let begun = Instant::now();
            http::get(site.addr, BOTH[number % 2], "/hello").await?.expect(200, "hello\n")?;
            slowest = slowest.max(begun.elapsed());
        }
        Ok(())
    })?;
    let growth = site.memory_kib()?.saturating_sub(before);
    ensure!(slowest < Duration::from_millis(300), "beside {SLOW} slow clients a request took {slowest:?}");
    ensure!(growth < 10 * 1024, "{SLOW} slow clients cost {growth} KiB");
    let begun = Instant::now();
    for stream in &mut slow {
        let (_, end) = http::read_all(stream, PROMPT)?;
        ensure!(end != End::Open, "a slow client is kept");
    }
    ensure!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
    Ok(())
}

fn slow_body(containerd: &Containerd) -> Outcome {
    serving(containerd, &IMPATIENT, async |site| {
        body_stops(site).await?;
        for protocol in BOTH {
            patient_body(site.addr, protocol).await?;
        }
        Ok(())
    })
}

pub async fn body_stops(site: &Site<'_>) -> Outcome {
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
}

/// It takes longer than the idle timeout, but there is progress.
async fn patient_body(addr: SocketAddr, protocol: Protocol) -> Outcome {
    let mut connection = Connection::open(addr, protocol).await?;
    let (feed, body) = http::fed();
    let request = connection.request(Method::POST, "/count", body)?;
    let (answer, _) = tokio::try_join!(connection.fetch(request), async {
        for _ in 0..5 {
            feed.send(Frame::data("piece".into())).await?;
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        drop(feed);
        Ok(())
    })?;
    ensure!(answer.status == 200 && answer.text().starts_with("25 "), "{protocol:?}: {answer:?}");
    Ok(())
}

/// Asks until the only place for a request is free. Who had it before may give it back a moment after its answer.
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

pub async fn free(addr: SocketAddr) -> Outcome {
    let mut connection = Connection::open(addr, Protocol::Two).await?;
    once_free(&mut connection, "/hello").await?.expect(200, "hello\n")
}

async fn taken(site: &Site<'_>) -> Outcome {
    let answer = http::get(site.addr, Protocol::One, "/hello").await?;
    ensure!(answer.status == 503, "the place is free too early: {answer:?}");
    Ok(())
}

pub async fn reader_stalls(site: &Site<'_>) -> Outcome {
    let mut stream = http::socket(site.addr)?;
    write!(stream, "GET /big?bytes={LENGTH}&say=begun HTTP/1.1\r\nHost: a\r\n\r\n")?;
    site.told("begun", 1).await?;
    taken(site).await?;
    free(site.addr).await?;
    let (bytes, end) = http::read_all(&mut stream, PROMPT)?;
    ensure!(end != End::Open && bytes.len() < LENGTH, "{} bytes, {end:?}", bytes.len());
    Ok(())
}

pub async fn stream_stalls(site: &Site<'_>) -> Outcome {
    let mut connection = Connection::open(site.addr, Protocol::Two).await?;
    let request = connection.request(Method::GET, &format!("/big?bytes={LENGTH}"), http::empty())?;
    let unread = connection.send(request).await?;
    taken(site).await?;
    // The stream alone: its connection goes on. A slow guest is nobody's fault.
    once_free(&mut connection, "/sleep-after-head?ms=900").await?.expect(200, "first\nsecond\n")?;
    ensure!(Answer::of(unread).await.is_err(), "the body ended as if it were whole");
    Ok(())
}

fn idle(containerd: &Containerd) -> Outcome {
    serving(containerd, &IMPATIENT, async |site| {
        for protocol in BOTH {
            let mut connection = Connection::open(site.addr, protocol).await?;
            for _ in 0..2 {
                connection.get("/hello").await?.expect(200, "hello\n")?;
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            // A request in flight is no idleness, however long the guest takes.
            connection.get("/sleep?ms=900").await?.expect(200, "slept\n")?;
            let begun = Instant::now();
            http::within(PROMPT, "the end", async { anyhow::Ok(connection.driver.await.is_ok()) }).await?;
            ensure!(begun.elapsed() > Duration::from_millis(300), "{protocol:?}: after {:?}", begun.elapsed());
        }
        Ok(())
    })
}

/// HTTP/2 talks between requests (the acknowledgement of SETTINGS, at least): that begins none.
fn rests(containerd: &Containerd) -> Outcome {
    serving(containerd, &[("HEADER_TIMEOUT", "300ms")], async |site| {
        let mut connections = Vec::new();
        for protocol in BOTH {
            let mut connection = Connection::open(site.addr, protocol).await?;
            connection.get("/big?bytes=300000").await?;
            connections.push(connection);
        }
        tokio::time::sleep(Duration::from_millis(900)).await;
        for mut connection in connections {
            connection.get("/hello").await.context("the connection was closed")?.expect(200, "hello\n")?;
        }
        Ok(())
    })
}

fn leaves(containerd: &Containerd) -> Outcome {
    for path in ["/sleep", "/spin", "/sleep-after-head", "/spin-after-head"] {
        for protocol in BOTH {
            serving(containerd, &[ONE_PLACE], async |site| leave(site, protocol, path, "begun").await)?;
        }
    }
    Ok(())
}

/// A client goes when the guest has said this.
pub async fn leave(site: &Site<'_>, protocol: Protocol, path: &str, said: &str) -> Outcome {
    let path = format!("{path}?ms=60000&say=begun");
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
            let request = streams.request(Method::GET, &path, http::empty())?;
            let given_up = tokio::spawn(streams.begin(request)?);
            site.told(said, 1).await?;
            taken(site).await?;
            given_up.abort();
        }
    }
    let answer = once_free(&mut streams, "/hello").await.with_context(|| format!("{protocol:?} {path}"))?;
    answer.expect(200, "hello\n")
}

/// Behind what it sent and nobody reads, as far as that has come. The watch for it ends with the request.
fn leaves_unread(containerd: &Containerd) -> Outcome {
    serving(containerd, &[ONE_PLACE], async |site| {
        free(site.addr).await?;
        let daemon = site.container.daemon()?;
        let before = proc::holdings(daemon)?;
        let upload = format!("Content-Length: 9000000\r\n\r\n{}", "a".repeat(30_000));
        let question = "Content-Length: 9\r\nExpect: 100-continue\r\n\r\n".to_owned();
        let another = "\r\nGET /hello HTTP/1.1\r\nHost: a\r\n\r\n".to_owned();
        for (what, rest) in [("upload", upload), ("question", question), ("another", another)] {
            let mut stream = http::socket(site.addr)?;
            let head = format!("POST /sleep?ms=60000&say={what} HTTP/1.1\r\nHost: a\r\n");
            stream.write_all((head + &rest).as_bytes())?;
            site.told(what, 1).await?;
            drop(stream);
            free(site.addr).await.context(what)?;
        }
        let mut kept = Connection::open(site.addr, Protocol::One).await?;
        kept.get("/sleep?ms=50").await?.expect(200, "slept\n")?;
        wait::until_true("the descriptors to be closed", SOON, || {
            // That of the connection which is open.
            Ok(proc::holdings(daemon)?.descriptors <= before.descriptors + 1)
        })
    })
}
