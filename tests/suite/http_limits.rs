//! What a server allows: time, size, number. Whoever asks for more is told so, or cut, and costs the others nothing.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Frame;
use hyper::http::{HeaderValue, Method};

use super::http_failures::{Seen, failing};
use super::http_serve::serving;
use crate::common::containerd::Containerd;
use crate::common::http::{self, Answer, BOTH, Connection, End, Protocol};
use crate::common::site::{self, Site};
use crate::common::{Outcome, SOON, wait};

pub const CASES: crate::common::Cases = &[
    ("a_request_that_takes_too_long_is_504", timeout),
    ("past_its_time_a_body_breaks_off", timeout_after_head),
    ("past_its_time_an_answer_that_is_read_slowly_breaks_off", timeout_of_reader),
    ("a_slow_head_is_not_waited_for", slow_head),
    ("a_body_that_stops_coming_is_not_waited_for", slow_body),
    ("a_client_that_does_not_read_is_cut", slow_reader),
    ("a_stream_whose_client_does_not_read_is_reset", slow_stream),
    ("an_idle_connection_is_closed", idle),
    ("a_connection_that_rests_is_not_hurried", rests),
    ("a_client_that_leaves_frees_its_place", leaves),
    ("more_requests_than_allowed_are_503", overload),
    ("a_large_body_is_413", large_body),
    ("a_large_head_is_431", large_head),
    ("too_many_fields_are_431", many_fields),
    ("a_guest_that_takes_too_much_memory_is_500", memory),
];

pub const NEWEST: crate::common::Cases = &[("five_hundred_slow_clients_harm_nobody", many_slow_heads)];

/// Bound of what is to happen after a few hundred milliseconds, on a machine that is busy.
const PROMPT: Duration = Duration::from_secs(3);

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
        drop(feed);
        for protocol in BOTH {
            patient_body(site.addr, protocol).await?;
        }
        Ok(())
    })
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

/// Waits until the only place for a request is free.
async fn free(addr: SocketAddr) -> Outcome {
    let begun = Instant::now();
    loop {
        let answer = http::get(addr, Protocol::One, "/hello").await?;
        if answer.status == 200 {
            return answer.expect(200, "hello\n");
        }
        ensure!(answer.status == 503 && begun.elapsed() < PROMPT, "after {:?}: {answer:?}", begun.elapsed());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

const ONE_PLACE: (&str, &str) = ("MAX_CONCURRENT_REQUESTS", "1");

fn slow_reader(containerd: &Containerd) -> Outcome {
    const LENGTH: usize = 64 << 20;
    serving(containerd, &[("IDLE_TIMEOUT", "500ms"), ONE_PLACE], async |site| {
        let mut stream = http::socket(site.addr)?;
        stream.write_all(format!("GET /big?bytes={LENGTH} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())?;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let answer = http::get(site.addr, Protocol::One, "/hello").await?;
        ensure!(answer.status == 503, "the place is free too early: {answer:?}");
        free(site.addr).await.context("HTTP/1.1")?;
        let (bytes, end) = http::read_all(&mut stream, PROMPT)?;
        ensure!(end != End::Open && bytes.len() < LENGTH, "{} bytes, {end:?}", bytes.len());
        Ok(())
    })
}

fn slow_stream(containerd: &Containerd) -> Outcome {
    const LENGTH: usize = 64 << 20;
    serving(containerd, &[("IDLE_TIMEOUT", "500ms"), ONE_PLACE], async |site| {
        let mut connection = Connection::open(site.addr, Protocol::Two).await?;
        let request = connection.request(Method::GET, &format!("/big?bytes={LENGTH}"), http::empty())?;
        let unread = connection.send(request).await?;
        let busy = http::get(site.addr, Protocol::One, "/hello").await?;
        ensure!(busy.status == 503, "the place is free too early: {busy:?}");
        free(site.addr).await?;
        // The stream alone: its connection goes on. A slow guest is nobody's fault.
        connection.get("/sleep-after-head?ms=900").await?.expect(200, "first\nsecond\n")?;
        ensure!(Answer::of(unread).await.is_err(), "the body ended as if it were whole");
        Ok(())
    })
}

fn idle(containerd: &Containerd) -> Outcome {
    serving(containerd, &[("IDLE_TIMEOUT", "500ms")], async |site| {
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
    serving(containerd, &[ONE_PLACE], async |site| {
        for path in ["/sleep?ms=60000", "/spin", "/sleep-after-head?ms=60000", "/spin-after-head"] {
            let mut stream = http::socket(site.addr)?;
            stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())?;
            tokio::time::sleep(Duration::from_millis(150)).await;
            drop(stream);
            free(site.addr).await.with_context(|| format!("HTTP/1.1 {path}"))?;
            // A stream that is given up, on a connection that stays.
            let mut streams = Connection::open(site.addr, Protocol::Two).await?;
            let request = streams.request(Method::GET, path, http::empty())?;
            let begun = tokio::time::timeout(Duration::from_millis(150), streams.send(request)).await;
            drop(begun);
            free(site.addr).await.with_context(|| format!("HTTP/2 {path}"))?;
            streams.get("/hello").await?.expect(200, "hello\n")?;
        }
        // Behind what it sent and nobody reads, as far as that has come.
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
        Ok(())
    })
}

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
    serving(containerd, &[("MAX_BODY", "1000")], async |site| {
        for protocol in BOTH {
            let mut connection = Connection::open(site.addr, protocol).await?;
            let answer = connection.post("/count", vec![b'x'; 1000]).await?;
            ensure!(answer.status == 200 && answer.text().starts_with("1000 "), "{protocol:?}: {answer:?}");
            let answer = connection.post("/count", vec![b'x'; 1001]).await?;
            ensure!(answer.status == 413, "{protocol:?}: {answer:?}");
            for (path, pieces) in [("/count", 4), ("/count", 2)] {
                let answer = in_pieces(site.addr, protocol, path, pieces).await?;
                let expected = if pieces == 4 { 413 } else { 200 };
                ensure!(answer.status == expected, "{protocol:?}: {pieces} × 400 bytes: {answer:?}");
            }
            // Too late for a status: the body breaks off.
            let echoed = in_pieces(site.addr, protocol, "/echo", 4).await;
            let clean = echoed.as_ref().is_ok_and(|answer| answer.status == 200);
            ensure!(!clean, "{protocol:?}: a part of the body is echoed as a whole: {echoed:?}");
            http::get(site.addr, protocol, "/hello").await?.expect(200, "hello\n")?;
        }
        Ok(())
    })
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
