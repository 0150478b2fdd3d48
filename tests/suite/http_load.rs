//! No request is lost: not when a container is stopped under load, and not when another takes its place.
//!
//! The client counts strictly. A request is lost if any byte of it was written and no complete answer came, whatever the
//! reason. It is not lost if the connection had been closed before it was written, or could not be opened: a client is
//! then free to ask elsewhere.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::net::RecvFlags;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::common::containerd::Containerd;
use crate::common::http::{self, Connection};
use crate::common::shim::{self, Shim};
use crate::common::site::{self, Site};
use crate::common::{Outcome, SOON, guests, wait};

pub const CASES: crate::common::Cases =
    &[("no_request_is_lost_when_a_server_is_stopped", stopped), ("no_request_is_lost_in_a_rolling_update", rolling)];

pub const BARE: crate::common::BareCases = &[("a_process_without_room_for_a_pool_serves", cramped)];

/// Requests of all sorts; each has an answer that can be told from another's.
const REQUESTS: [(&str, &str); 4] = [
    ("GET /hello HTTP/1.1\r\nHost: a\r\n\r\n", "hello\n"),
    ("POST /count HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nabcde", "5 "),
    ("GET /sleep?ms=20 HTTP/1.1\r\nHost: a\r\n\r\n", "slept\n"),
    ("POST /count HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "3 "),
];

/// What all clients of a load have in common.
struct Load {
    /// Where a new connection goes.
    target: Mutex<SocketAddr>,
    answered: AtomicUsize,
    /// Stop when so many are answered, or when the target refuses and nobody takes its place.
    wanted: usize,
    follows: bool,
    over: AtomicBool,
    lost: Mutex<Vec<String>>,
}

impl Load {
    fn new(target: SocketAddr, wanted: usize, follows: bool) -> Arc<Self> {
        Arc::new(Self {
            target: Mutex::new(target),
            answered: AtomicUsize::new(0),
            wanted,
            follows,
            over: AtomicBool::new(false),
            lost: Mutex::default(),
        })
    }

    fn target(&self) -> SocketAddr {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn_to(&self, target: SocketAddr) {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = target;
    }

    fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed) || self.answered() >= self.wanted
    }

    /// Runs the clients on a thread of their own.
    fn run(self: &Arc<Self>, clients: usize) -> thread::JoinHandle<Outcome> {
        let load = Arc::clone(self);
        thread::spawn(move || {
            http::block_on(async {
                let mut running = tokio::task::JoinSet::new();
                for number in 0..clients {
                    running.spawn(client(Arc::clone(&load), number));
                }
                while let Some(client) = running.join_next().await {
                    client??;
                }
                Ok(())
            })
        })
    }

    fn wait_answered(&self, count: usize) -> Outcome {
        wait::until_true(&format!("{count} answers"), Duration::from_secs(60), || {
            Ok(self.answered() >= count || !self.lost().is_empty())
        })
    }

    fn lost(&self) -> Vec<String> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn expect_none_lost(&self) -> Outcome {
        let lost = self.lost();
        let first = &lost[..lost.len().min(5)];
        ensure!(lost.is_empty(), "{} of {} requests are lost: {first:#?}", lost.len(), self.answered() + lost.len());
        Ok(())
    }
}

/// One client with keep-alive, and without a pause.
async fn client(load: Arc<Load>, number: usize) -> Outcome {
    let mut turn = number;
    let mut refusals = 0;
    while !load.is_over() {
        let target = load.target();
        let mut stream = match http::soon("a connection", TcpStream::connect(target)).await {
            Ok(stream) => stream,
            Err(error) if load.follows && refusals < 200 => {
                refusals += 1;
                ensure!(refusals < 200, "{target} refuses for too long: {error:#}");
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            }
            // It is stopped: all is done.
            Err(_) => return Ok(()),
        };
        refusals = 0;
        stream.set_nodelay(true)?;
        let mut requests = 0;
        while !load.is_over() && !is_closed(&stream) {
            let (request, expected) = REQUESTS[turn % REQUESTS.len()];
            turn += 1;
            requests += 1;
            match http::soon("an answer", ask(&mut stream, request)).await {
                Ok((text, last)) => {
                    ensure!(text.starts_with(expected), "{request:?} was answered with {text:?}");
                    load.answered.fetch_add(1, Ordering::Relaxed);
                    if last {
                        break;
                    }
                }
                Err(error) => {
                    let what = format!("request {requests} of a connection to {target}, {request:?}: {error:#}");
                    load.lost.lock().unwrap_or_else(PoisonError::into_inner).push(what);
                    break;
                }
            }
        }
    }
    Ok(())
}

/// Whether the server has ended the connection, by what this kernel knows right now.
fn is_closed(stream: &TcpStream) -> bool {
    match rustix::net::recv(stream, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((count, _)) => count == 0,
        Err(error) => error != rustix::io::Errno::AGAIN,
    }
}

/// The answer's body, and whether it is the connection's last.
async fn ask(stream: &mut TcpStream, request: &str) -> Result<(String, bool)> {
    stream.write_all(request.as_bytes()).await.context("write")?;
    let mut bytes = Vec::new();
    loop {
        if let Some(answer) = complete(&bytes)? {
            return Ok(answer);
        }
        let count = stream.read_buf(&mut bytes).await.with_context(|| format!("read after {} bytes", bytes.len()))?;
        ensure!(count > 0, "the connection ended after {} bytes of the answer", bytes.len());
    }
}

fn complete(bytes: &[u8]) -> Result<Option<(String, bool)>> {
    let text = std::str::from_utf8(bytes)?;
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return Ok(None) };
    let head = head.to_ascii_lowercase();
    ensure!(head.starts_with("http/1.1 200 "), "the answer is {text:?}");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).context("no length")?;
    let length: usize = length.parse()?;
    match body.len() {
        have if have < length => Ok(None),
        have if have == length => Ok(Some((body.to_owned(), head.contains("\r\nconnection: close")))),
        _ => bail!("more than one answer: {text:?}"),
    }
}

/// 200 clients at once, and one signal.
fn stopped(containerd: &Containerd) -> Outcome {
    for signal in ["SIGTERM", "SIGINT"] {
        let site = site::web(&containerd.namespace("http"), &[])?;
        let load = Load::new(site.addr, usize::MAX, false);
        let clients = load.run(200);
        load.wait_answered(1000)?;
        site.container.kill(signal)?;
        let told = Instant::now();
        let drained = site.drained(0, SOON)?;
        load.over.store(true, Ordering::Relaxed);
        clients.join().ok().context("the clients")??;
        load.expect_none_lost().with_context(|| format!("{drained:?}"))?;
        ensure!(drained["cut"] == "0", "{drained:?}");
        ensure!(told.elapsed() < Duration::from_secs(10), "the drain took {:?}", told.elapsed());
    }
    Ok(())
}

/// One container after another takes over, under load. All of it on 2.1; a shorter one with the others.
fn rolling(containerd: &Containerd) -> Outcome {
    let wanted = if containerd.version == "2.1" { 20_000 } else { 4_000 };
    let client = containerd.namespace("http");
    let mut site = site::web(&client, &[])?;
    let load = Load::new(site.addr, wanted, true);
    let clients = load.run(200);
    for step in 1..=4 {
        load.wait_answered(wanted * step / 5)?;
        let next: Site<'_> = site::web(&client, &[])?;
        load.turn_to(next.addr);
        let drained = site.drain("SIGTERM", 0)?;
        ensure!(drained["cut"] == "0", "{drained:?}");
        site = next;
    }
    clients.join().ok().context("the clients")??;
    load.expect_none_lost()?;
    ensure!(load.answered() >= wanted);
    Ok(())
}

/// Address space is all that the pool costs, and here there is not enough of it: instances are made one by one.
fn cramped() -> Outcome {
    const ROOM: u64 = 128 << 30;
    let shim = Shim::new("cramped")?;
    let addr = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let mut spec = shim::spec(&[site::WEB.to_owned()]);
    spec["process"]["env"] = serde_json::json!(["PATH=/bin", format!("{}SOCKET_ADDR={addr}", site::PREFIX)]);
    let bundle = shim.bundle_of("cramped", &spec)?;
    std::fs::copy(guests::built("web.wasm")?, bundle.folder.join("rootfs/web.wasm"))?;
    let task = shim.task(&bundle)?;
    let daemon = i32::try_from(shim.daemon()?).ok().and_then(rustix::process::Pid::from_raw);
    let limit = rustix::process::Rlimit { current: Some(ROOM), maximum: Some(ROOM) };
    rustix::process::prlimit(daemon, rustix::process::Resource::As, limit)?;
    task.create()?;
    task.start()?;
    http::block_on(async {
        let mut clients = tokio::task::JoinSet::new();
        for number in 0..8 {
            clients.spawn(async move {
                let mut connection = Connection::open(addr, http::BOTH[number % 2]).await?;
                let secret = format!("known to client {number} and to nobody else");
                for _ in 0..20 {
                    connection.get("/static-counter").await?.expect(200, "1\n")?;
                    connection.get("/alloc?bytes=3000000").await?.expect(200, "3000000\n")?;
                    connection.post("/remember", secret.clone()).await?.expect(200, "ok\n")?;
                    connection.post("/search", secret.clone()).await?.expect(200, "found 0\n")?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(client) = clients.join_next().await {
            client??;
        }
        Ok(())
    })?;
    task.kill(15)?;
    ensure!(task.wait()? == 0, "it did not drain");
    task.delete()?;
    drop(task);
    shim.expect_end()
}
