//! How a served container stops: what is in flight ends first, nothing new begins, and patience has an end.

use std::io::Write as _;
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Frame;
use hyper::http::{Method, Response};

use super::http_serve::serving;
use crate::common::containerd::Containerd;
use crate::common::http::{self, Answer, BOTH, Connection, Protocol};
use crate::common::site::{self, Site};
use crate::common::{Outcome, SOON, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("what_is_in_flight_is_finished", in_flight),
    ("bodies_under_way_are_finished", bodies),
    ("idle_connections_are_told", idle),
    ("a_connection_with_a_stream_is_told_at_once", goaway),
    ("an_idle_server_stops_at_once", idle_server),
    ("past_the_drain_timeout_requests_are_cut", timeout),
    ("a_second_signal_ends_the_drain", second_signal),
    ("sigkill_waits_for_nothing", sigkill),
    ("a_reader_that_stalls_does_not_hold_up_the_end", stalled),
    ("a_connection_that_says_nothing_is_not_waited_for", silent),
    ("in_the_foreground_ctr_ends_with_the_drain", foreground),
];

/// Bytes of lines that a FIFO holds at least: no line begins in a page that cannot take all of it.
const PIPE: u64 = 60 << 10;

/// Between a signal and its effect, with `ctr` in between on a busy machine.
const PROMPT: Duration = Duration::from_secs(3);

/// `ctr task kill` takes its time; the clients of this thread go on meanwhile.
async fn signal(site: &Site<'_>, signal: &str) -> Outcome {
    // On a scoped thread, because the container is borrowed.
    std::thread::scope(|scope| scope.spawn(|| site.container.kill(signal)).join()).ok().context("the thread")?
}

fn in_flight(containerd: &Containerd) -> Outcome {
    for name in ["SIGTERM", "SIGINT", "SIGUSR1"] {
        serving(containerd, &[], async |site| {
            let mut tasks = tokio::task::JoinSet::new();
            for number in 0..8 {
                let addr = site.addr;
                let path = if number < 6 { "/sleep?ms=1500&say=begun" } else { "/spin?ms=1200&say=begun" };
                tasks.spawn(async move { http::get(addr, BOTH[number % 2], path).await });
            }
            site.told("begun", 8).await?;
            signal(site, name).await?;
            refused(site)?;
            while let Some(answer) = tasks.join_next().await {
                let answer = answer??;
                ensure!(answer.status == 200 && ["slept\n", "spun\n"].contains(&&*answer.text()), "{answer:?}");
            }
            let drained = site.drained(0, SOON)?;
            ensure!(drained["finished"] == "8" && drained["cut"] == "0", "{name}: {drained:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Nobody is let in any more.
fn refused(site: &Site<'_>) -> Outcome {
    wait::until_true("connections to be refused", Duration::from_secs(1), || {
        let connected = TcpStream::connect_timeout(&site.addr, Duration::from_millis(100));
        Ok(connected.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused))
    })
}

/// A download whose guest still writes, and an upload whose client still sends.
fn bodies(containerd: &Containerd) -> Outcome {
    for protocol in BOTH {
        serving(containerd, &[], async |site| {
            let mut down = Connection::open(site.addr, protocol).await?;
            let request = down.request(Method::GET, "/sleep-after-head?ms=1500", http::empty())?;
            let down = down.send(request).await?;
            let mut up = Connection::open(site.addr, protocol).await?;
            let (feed, body) = http::fed();
            let request = up.request(Method::POST, "/echo", body)?;
            let mut up = up.send(request).await?;
            feed.send(Frame::data("before ".into())).await?;
            ensure!(piece(&mut up).await? == "before ");
            signal(site, "SIGTERM").await?;
            refused(site)?;
            for text in ["while ", "it ", "drains"] {
                feed.send(Frame::data(text.into())).await?;
                ensure!(piece(&mut up).await? == text);
                tokio::time::sleep(Duration::from_millis(150)).await;
            }
            drop(feed);
            Answer::of(up).await?.expect(200, "")?;
            Answer::of(down).await?.expect(200, "first\nsecond\n")?;
            let drained = site.drained(0, SOON)?;
            ensure!(drained["finished"] == "2" && drained["cut"] == "0", "{protocol:?}: {drained:?}");
            Ok(())
        })?;
    }
    Ok(())
}

async fn piece(response: &mut Response<hyper::body::Incoming>) -> Result<Bytes> {
    let frame = http::soon("a piece", async { response.frame().await.context("the body ended") }).await??;
    frame.into_data().map_err(|frame| anyhow::anyhow!("{frame:?}"))
}

/// Closed in order, and soon; one with a request in flight is told with its answer.
fn idle(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        let mut resting = Vec::new();
        for number in 0..20 {
            let mut connection = Connection::open(site.addr, BOTH[number % 2]).await?;
            connection.get("/hello").await?.expect(200, "hello\n")?;
            resting.push(connection);
        }
        let addr = site.addr;
        let busy = tokio::spawn(async move { http::get(addr, Protocol::One, "/sleep?ms=2000&say=begun").await });
        let mut streams = Connection::open(site.addr, Protocol::Two).await?;
        let request = streams.request(Method::GET, "/sleep?ms=2000&say=begun", http::empty())?;
        let streamed = tokio::spawn(async move { anyhow::Ok((streams.fetch(request).await?, streams)) });
        site.told("begun", 2).await?;
        signal(site, "SIGTERM").await?;
        let told = Instant::now();
        for connection in resting {
            let ended = http::soon("the end of an idle connection", connection.driver).await?;
            ensure!(ended.is_ok(), "an idle connection ended with {ended:?}");
        }
        ensure!(told.elapsed() < Duration::from_secs(1), "idle connections were kept for {:?}", told.elapsed());
        let answer = busy.await??;
        answer.expect(200, "slept\n")?;
        ensure!(answer.header("connection") == Some("close"), "the client does not know: {answer:?}");
        let (answer, streams) = streamed.await??;
        answer.expect(200, "slept\n")?;
        // GOAWAY: no error, and no further stream.
        let ended = http::soon("the end of the streams", streams.driver).await?;
        ensure!(ended.is_ok(), "HTTP/2 ended with {ended:?}");
        let drained = site.drained(0, SOON)?;
        ensure!(drained["finished"] == "2" && drained["cut"] == "0", "{drained:?}");
        Ok(())
    })
}

/// Frame by frame: a client of HTTP/2 learns of the drain while its request is under way, and not with the answer.
fn goaway(containerd: &Containerd) -> Outcome {
    const HEADERS: u8 = 1;
    const GOAWAY: u8 = 7;
    serving(containerd, &[], async |site| {
        let mut socket = http::socket(site.addr)?;
        let path = b"/sleep?ms=1500&say=begun";
        // GET, http, the path and the authority `a` (RFC 7541, appendix A).
        let block = [&[0x82, 0x86, 0x04, path.len() as u8][..], path, &[0x01, 1, b'a']].concat();
        let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        let head = [0, 0, block.len() as u8, HEADERS, 5, 0, 0, 0, 1];
        socket.write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &settings[..], &head, &block].concat())?;
        site.told("begun", 1).await?;
        signal(site, "SIGTERM").await?;
        // This client acknowledges no PING, and so is not let go: it has to leave.
        let (bytes, _) = http::read_all(&mut socket, 2 * PROMPT)?;
        drop(socket);
        let (mut kinds, mut rest) = (Vec::new(), &bytes[..]);
        while let [high, middle, low, kind, _, _, _, _, _, frames @ ..] = rest {
            kinds.push(*kind);
            rest = frames.get(u32::from_be_bytes([0, *high, *middle, *low]) as usize..).unwrap_or_default();
        }
        let at = |kind| kinds.iter().position(|seen| *seen == kind);
        ensure!(at(GOAWAY).is_some() && at(GOAWAY) < at(HEADERS), "the frames are of the kinds {kinds:?}");
        let drained = site.drained(0, SOON)?;
        ensure!(drained["finished"] == "1" && drained["cut"] == "0", "{drained:?}");
        Ok(())
    })
}

fn idle_server(containerd: &Containerd) -> Outcome {
    let site = site::web(&containerd.namespace("http"), &[])?;
    let (exit, took) = site.container.kill_and_wait("SIGTERM")?;
    ensure!(exit.exit_code() == 0 && took < Duration::from_secs(1), "{exit:?} after {took:?}");
    let drained = site.wait_line("drained")?;
    ensure!(drained["finished"] == "0" && drained["cut"] == "0" && drained["code"] == "0", "{drained:?}");
    Ok(())
}

/// Requests that do not end, one of each kind. None may look like a complete answer.
struct Endless(tokio::task::JoinSet<Result<Answer>>);

impl Endless {
    const COUNT: usize = 6;

    async fn begin(site: &Site<'_>) -> Result<Self> {
        let mut tasks = tokio::task::JoinSet::new();
        for protocol in BOTH {
            for path in ["/sleep?ms=60000&say=endless", "/sleep-after-head?ms=60000&say=endless", "/spin?say=endless"] {
                let addr = site.addr;
                tasks.spawn(async move { http::get(addr, protocol, path).await });
            }
        }
        ensure!(tasks.len() == Self::COUNT);
        site.told("endless", Self::COUNT).await?;
        Ok(Self(tasks))
    }

    async fn expect_cut(mut self) -> Outcome {
        while let Some(answer) = self.0.join_next().await {
            let answer = answer?;
            let refused = answer.as_ref().is_ok_and(|answer| answer.status == 503);
            ensure!(answer.is_err() || refused, "a request that was cut looks complete: {answer:?}");
        }
        Ok(())
    }
}

fn timeout(containerd: &Containerd) -> Outcome {
    for (name, code) in [("SIGTERM", 143), ("SIGINT", 130)] {
        serving(containerd, &[("DRAIN_TIMEOUT", "700ms")], async |site| {
            let endless = Endless::begin(site).await?;
            let addr = site.addr;
            let short = tokio::spawn(async move { http::get(addr, Protocol::One, "/sleep?ms=600&say=short").await });
            site.told("short", 1).await?;
            signal(site, name).await?;
            let told = Instant::now();
            short.await??.expect(200, "slept\n")?;
            endless.expect_cut().await?;
            let drained = site.drained(code, SOON)?;
            ensure!(told.elapsed() < PROMPT, "it took {:?}", told.elapsed());
            ensure!(drained["finished"] == "1" && drained["cut"] == "6", "{name}: {drained:?}");
            ensure!(drained["code"] == code.to_string(), "{drained:?}");
            Ok(())
        })?;
    }
    // None at all: what runs is cut at once.
    serving(containerd, &[("DRAIN_TIMEOUT", "0s")], async |site| {
        let endless = Endless::begin(site).await?;
        signal(site, "SIGTERM").await?;
        endless.expect_cut().await?;
        site.drained(143, PROMPT).map(drop)
    })
}

fn second_signal(containerd: &Containerd) -> Outcome {
    for (first, second, code) in [("SIGTERM", "SIGTERM", 143), ("SIGTERM", "SIGINT", 130), ("SIGINT", "SIGKILL", 137)] {
        serving(containerd, &[], async |site| {
            let endless = Endless::begin(site).await?;
            signal(site, first).await?;
            site.wait_line("draining")?;
            ensure!(site.container.status()?.as_deref() == Some("RUNNING"), "{first} alone ended it");
            signal(site, second).await?;
            endless.expect_cut().await?;
            let drained = site.drained(code, PROMPT)?;
            ensure!(drained["cut"] == Endless::COUNT.to_string(), "{drained:?}");
            Ok(())
        })?;
    }
    Ok(())
}

fn sigkill(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        let endless = Endless::begin(site).await?;
        signal(site, "SIGKILL").await?;
        endless.expect_cut().await?;
        let exit = site.container.exit_within(PROMPT)?;
        ensure!(exit.exit_code() == 137, "{exit:?}");
        refused(site)
    })
}

/// It never sent a byte, or only a part of a head: nothing that was accepted is lost with it.
fn silent(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        let silent = (0..5).map(|_| http::socket(site.addr)).collect::<Result<Vec<_>>>()?;
        let mut late = http::socket(site.addr)?;
        // They are accepted in turn, and so all the others are by now.
        http::get(site.addr, Protocol::One, "/hello").await?.expect(200, "hello\n")?;
        signal(site, "SIGTERM").await?;
        // A client that connected before the signal and speaks right after it.
        let began = Instant::now();
        std::io::Write::write_all(&mut late, b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n").ok();
        let (_, end) = http::read_all(&mut late, PROMPT)?;
        ensure!(end != http::End::Open, "it is kept");
        site.drained(0, PROMPT)?;
        ensure!(began.elapsed() < PROMPT, "it took {:?}", began.elapsed());
        drop(silent);
        Ok(())
    })
}

/// Its `ctr` is gone, so its FIFO is full and nobody reads: neither a guest that waits for the reader nor what is left of its
/// output holds up the end for long.
fn stalled(containerd: &Containerd) -> Outcome {
    for (name, client_stays, code) in [("SIGTERM", true, 143), ("SIGTERM", false, 0), ("SIGKILL", true, 137)] {
        let client = containerd.namespace("http");
        let run = site::with(site::anywhere(client.guest(site::WEB, &[])?), &[("DRAIN_TIMEOUT", "300ms")]);
        let offset = containerd.log_length();
        let mut job = run.spawn()?;
        let site = Site::of(containerd, run.handle(), PathBuf::new(), offset)?;
        job.kill()?;
        let fifo = proc::descriptor(site.container.daemon()?, &format!("{}-stdout", site.container.id))?;
        http::block_on(async {
            let mut connection = Connection::open(site.addr, Protocol::One).await?;
            let driver = connection.driver.abort_handle();
            let path = "/log?lines=20000&text=nobody-reads-this";
            let waiting = tokio::spawn(async move { connection.get(path).await });
            while rustix::io::ioctl_fionread(&fifo)? < PIPE {
                ensure!(!waiting.is_finished(), "the guest should wait for its reader");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            if !client_stays {
                driver.abort();
                ensure!(waiting.await?.is_err(), "its connection is closed");
            }
            let begun = Instant::now();
            signal(&site, name).await?;
            let exit = site.container.exit_within(PROMPT)?;
            ensure!(exit.exit_code() == code, "{name}: {exit:?}");
            ensure!(begun.elapsed() < PROMPT, "{name} took {:?}", begun.elapsed());
            Ok(())
        })?;
    }
    Ok(())
}

fn foreground(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("http");
    let run = site::anywhere(client.guest(site::WEB, &[])?);
    let offset = containerd.log_length();
    let job = run.spawn()?;
    let site = Site::of(containerd, run.handle(), PathBuf::new(), offset)?;
    http::block_on(async {
        let request = tokio::spawn(http::get(site.addr, Protocol::One, "/sleep?ms=1000&say=begun"));
        while !job.stdout.text_so_far().contains("begun") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        site.container.kill("SIGTERM")?;
        request.await??.expect(200, "slept\n")
    })?;
    let done = job.wait(SOON)?;
    ensure!(done.code == Some(0), "ctr run ended with {done:?}");
    Ok(())
}
