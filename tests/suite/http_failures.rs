//! Guests that fail: the client can tell in every case, the log says which request and why, and the next one is served.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use http_body_util::BodyExt;
use hyper::http::Method;

use super::http_serve::serving;
use crate::common::containerd::Containerd;
use crate::common::ctr::Client;
use crate::common::http::{self, BOTH, Connection, End, Protocol};
use crate::common::site::{self, Site};
use crate::common::{Outcome, SOON, wait};

pub const CASES: crate::common::Cases = &[
    ("a_guest_without_an_answer_is_500", no_answer),
    ("a_body_that_breaks_off_is_no_whole_one", broken_bodies),
    ("nothing_ends_a_broken_body_on_the_wire", on_the_wire),
    ("a_failure_harms_no_other_stream", neighbours),
    ("guests_of_wasi_0_3_fail_alike", wasi3),
    ("a_guest_goes_on_after_its_answer", after),
    ("a_guest_that_fails_after_its_answer_is_told_of", fails_after),
    ("many_failures_leave_nothing", many),
];

/// How a client sees a failure.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub enum Seen {
    /// An answer of ours with this status.
    Status(u16),
    /// 200, and a body that visibly has no end.
    BrokenOff,
}

/// One request of a guest that fails. What looks like a complete answer of the guest fails the case.
pub async fn failing(connection: &mut Connection, path: &str) -> Result<Seen> {
    let request = connection.request(Method::GET, path, http::empty())?;
    let response = connection.send(request).await.context(path.to_owned())?;
    let (status, mut body) = (response.status().as_u16(), response.into_body());
    let mut bytes = Vec::new();
    loop {
        let frame = http::soon(&format!("the end of {path}"), async { anyhow::Ok(body.frame().await) }).await?;
        match frame {
            Some(Ok(frame)) => bytes.extend_from_slice(&frame.into_data().unwrap_or_default()),
            Some(Err(_)) if status == 200 => return Ok(Seen::BrokenOff),
            None if status >= 500 => return Ok(Seen::Status(status)),
            Some(Err(error)) => bail!("{path}: {status}, whose text breaks off: {error}"),
            None => bail!("{path}: {status} looks complete: {:?}", String::from_utf8_lossy(&bytes)),
        }
    }
}

/// Requests of one server, which numbers them in their order.
struct Teller<'a, 'b> {
    site: &'a Site<'b>,
    number: u64,
}

impl<'a, 'b> Teller<'a, 'b> {
    fn new(site: &'a Site<'b>) -> Self {
        Self { site, number: 0 }
    }

    /// Asks, and finds the lines about it in both logs.
    async fn ask(&mut self, protocol: Protocol, path: &str, cause: &str) -> Result<Seen> {
        self.number += 1;
        let mut connection = Connection::open(self.site.addr, protocol).await?;
        let seen = failing(&mut connection, path).await?;
        self.expect_lines(path, cause).with_context(|| format!("{protocol:?} {path}"))?;
        // Nobody else is harmed: not on a new connection, and not on the same one where it goes on.
        self.number += 1;
        http::get(self.site.addr, protocol, "/hello").await?.expect(200, "hello\n")?;
        if protocol == Protocol::Two {
            self.number += 1;
            connection.get("/hello").await.with_context(|| format!("after {path}"))?.expect(200, "hello\n")?;
        }
        Ok(seen)
    }

    /// One line each, with number, path and cause.
    fn expect_lines(&self, path: &str, cause: &str) -> Outcome {
        let plain = path.split_once('?').map_or(path, |(plain, _)| plain);
        let start = format!("request {} {plain}: ", self.number);
        let log = self.site.wait_log(&start)?;
        let lines: Vec<&str> = log.lines().filter(|line| line.starts_with(&start)).collect();
        ensure!(lines.len() == 1 && lines[0].contains(cause), "expected {cause:?} once in {log:?}");
        let number = format!("request={} ", self.number);
        let line = wait::until("the daemon's line", SOON, || {
            Ok(self.site.lines().into_iter().find(|line| line.contains(&number)))
        })?;
        ensure!(line.contains(plain) && line.contains(cause), "expected {cause:?} in {line:?}");
        let again = self.site.lines().iter().filter(|line| line.contains(&number)).count();
        ensure!(again == 1, "{again} lines about request {}", self.number);
        Ok(())
    }
}

fn no_answer(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        let mut teller = Teller::new(site);
        for protocol in BOTH {
            for (path, cause) in [
                ("/trap", "unreachable"),
                ("/panic", "unreachable"),
                ("/exit?code=3", "exit"),
                ("/exit?code=0", "exit"),
                ("/never", "without an answer"),
                ("/error", "on demand"),
                ("/status?code=100", "cannot be the last"),
                ("/status?code=101", "cannot be the last"),
                ("/status?code=103", "cannot be the last"),
            ] {
                let seen = teller.ask(protocol, path, cause).await?;
                ensure!(seen == Seen::Status(500), "{protocol:?} {path}: {seen:?}");
            }
        }
        // What the guest itself said about its panic is there too.
        ensure!(site.log().contains("a panic on demand"), "{:?}", site.log());
        Ok(())
    })
}

fn broken_bodies(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        let mut teller = Teller::new(site);
        for protocol in BOTH {
            for (path, cause) in [
                ("/unfinished", "without finishing the body"),
                ("/leak", "without finishing the body"),
                ("/trap-after-head", "unreachable"),
                ("/wrong-length?declared=100&actual=10", "without finishing the body"),
                ("/wrong-length?declared=1000000&actual=300000", "without finishing the body"),
            ] {
                let seen = teller.ask(protocol, path, cause).await?;
                ensure!([Seen::Status(500), Seen::BrokenOff].contains(&seen), "{protocol:?} {path}: {seen:?}");
            }
            // Too much: refused, or broken off, and never more than was declared.
            for path in ["/wrong-length?declared=10&actual=100", "/wrong-length?declared=10&actual=1000000"] {
                let seen = teller.ask(protocol, path, "without finishing the body").await?;
                ensure!([Seen::Status(500), Seen::BrokenOff].contains(&seen), "{protocol:?} {path}: {seen:?}");
            }
        }
        Ok(())
    })
}

/// Byte by byte: no last chunk, no declared length that is reached.
fn on_the_wire(containerd: &Containerd) -> Outcome {
    let site = site::web(&containerd.namespace("http"), &[])?;
    for path in ["/unfinished", "/leak", "/trap-after-head", "/wrong-length?declared=100&actual=10"] {
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        let (bytes, end) = http::exchange(site.addr, request.as_bytes(), SOON / 4)?;
        let text = String::from_utf8_lossy(&bytes);
        if text.starts_with("HTTP/1.1 500 ") {
            continue;
        }
        ensure!(text.starts_with("HTTP/1.1 200 ") && end != End::Open, "{path}: {end:?} {text:?}");
        let body = text.split_once("\r\n\r\n").map(|(_, body)| body).unwrap_or_default();
        ensure!(!body.ends_with("0\r\n\r\n") && body.len() < 100, "{path}: {end:?} {text:?}");
        // HTTP/1.0 has no chunks: what can tell there is a length, or a reset.
        let done = http::curl(&["--fail", &format!("http://{}{path}", site.addr)])?;
        ensure!(done.code != Some(0), "curl takes {path} for complete: {done:?}");
    }
    Ok(())
}

/// One connection, one stream that lives through the ends of the others.
fn neighbours(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        let mut connection = Connection::open(site.addr, Protocol::Two).await?;
        let request = connection.request(Method::GET, "/sleep-after-head?ms=600", http::empty())?;
        let long = connection.send(request).await?;
        for path in ["/trap", "/trap-after-head", "/unfinished", "/leak", "/panic"] {
            failing(&mut connection, path).await?;
        }
        http::Answer::of(long).await?.expect(200, "first\nsecond\n")
    })
}

fn web3<'a>(client: &Client<'a>, settings: &[(&str, &str)]) -> Result<Site<'a>> {
    Site::start(site::with(client.guest("/web3.wasm", &[])?, settings))
}

fn wasi3(containerd: &Containerd) -> Outcome {
    let site = web3(&containerd.namespace("http"), &[])?;
    http::block_on(async {
        let mut teller = Teller::new(&site);
        for protocol in BOTH {
            for (path, cause, after_head) in [
                ("/trap", "unreachable", false),
                ("/error", "on demand", false),
                ("/trap-after-head", "unreachable", true),
                ("/unfinished", "", true),
            ] {
                let seen = teller.ask(protocol, path, cause).await?;
                let broken = after_head && seen == Seen::BrokenOff;
                ensure!(broken || seen == Seen::Status(500), "{protocol:?} {path}: {seen:?}");
            }
        }
        Ok(())
    })
    .with_context(|| format!("the container's log: {:?}", site.log()))
}

/// The client has everything, and goes; the guest has work left to do.
fn after(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        for (round, protocol) in BOTH.into_iter().enumerate() {
            let begun = Instant::now();
            let answer = http::get(site.addr, protocol, "/after?ms=700").await?;
            answer.expect(200, "done\n")?;
            ensure!(begun.elapsed() < Duration::from_millis(600), "it took {:?}", begun.elapsed());
            ensure!(site.log().matches("after done").count() == round, "too early: {:?}", site.log());
            wait::until_true("what the guest says at its end", SOON, || {
                Ok(site.log().matches("after done").count() == round + 1)
            })?;
        }
        ensure!(!site.lines().iter().any(|line| line.contains("failed")), "{:?}", site.lines());
        Ok(())
    })
}

/// Its client had a complete answer, so that nothing but the log can tell of its end.
fn fails_after(containerd: &Containerd) -> Outcome {
    serving(containerd, &[("REQUEST_TIMEOUT", "400ms")], async |site| {
        for protocol in BOTH {
            http::get(site.addr, protocol, "/after?ms=60000").await?.expect(200, "done\n")?;
        }
        // The deadline of the request holds for the rest as well: a drain has nobody to wait for.
        tokio::time::sleep(Duration::from_millis(600)).await;
        let begun = Instant::now();
        let drained = site.drain("SIGTERM", 0)?;
        ensure!(begun.elapsed() < Duration::from_secs(3), "it took {:?}", begun.elapsed());
        ensure!(drained["cut"] == "0", "{drained:?}");
        ensure!(!site.log().contains("after done"), "{:?}", site.log());
        Ok(())
    })
}

/// Traps by the hundred, in both protocols at once.
fn many(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        const PATHS: [&str; 5] = ["/trap", "/trap-after-head", "/never", "/leak", "/hello"];
        let round = async |count: usize| {
            let mut tasks = tokio::task::JoinSet::new();
            for number in 0..8 {
                let addr = site.addr;
                tasks.spawn(async move {
                    for turn in 0..count {
                        let path = PATHS[(number + turn) % PATHS.len()];
                        let mut connection = Connection::open(addr, BOTH[number % 2]).await?;
                        match path {
                            "/hello" => connection.get(path).await?.expect(200, "hello\n")?,
                            _ => drop(failing(&mut connection, path).await?),
                        }
                    }
                    anyhow::Ok(())
                });
            }
            while let Some(task) = tasks.join_next().await {
                task??;
            }
            anyhow::Ok(())
        };
        round(10).await?;
        let before = site.memory_kib()?;
        round(40).await?;
        let growth = site.memory_kib()?.saturating_sub(before);
        ensure!(growth < 4 * 1024, "320 requests that failed left {growth} KiB");
        Ok(())
    })
}
