//! What a request costs: `make bench`.
//!
//! | section | question | promise |
//! |---|---|---|
//! | throughput | a fresh instance for each request, beside a plain hyper server with a static body | 0.35 hello, 0.25 web |
//! | latency | p99 at half the maximum rate, beside the plain server's at half of its own | 3 x |
//! | reuse | the same with `INSTANCE_REUSE` | 0.60 |
//! | bounds | what explicit bounds checks cost a guest that computes, beside guard pages | (a figure) |
//! | neighbour | a healthy container beside one whose requests spin until their timeout, in one process | p99 50 ms, 0.25 of alone |
//! | density | what does a further idle container cost, and how fast do 500 start? | 100 KiB, 30 a second |
//!
//! One client (`wrk`, for latency that of `paced.rs`; 32 keep-alive connections, one thread) for all, on the same cores as the
//! servers, in turns. Needs root and wrk.

#[expect(dead_code, reason = "the tests use the rest of it")]
#[path = "../tests/common/mod.rs"]
mod common;
#[path = "http/paced.rs"]
mod paced;
#[expect(dead_code, reason = "other benches use the rest of it")]
mod report;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Response, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;

use common::containerd::Containerd;
use common::ctr::{Client, Container};
use common::machine::Stretch;
use common::{guests, image, job, wait};
use report::{Host, at_least, at_most, median, samples, spread};

const CONNECTIONS: &str = "32";
const SECONDS: &str = "3";
const ROUNDS: usize = 5;
/// Of pairs that are short, so that there are enough which nobody disturbs.
const PAIRS: usize = 15;
const IDLE_CONTAINERS: usize = 500;
const NATIVE_CONTAINERS: usize = 100;
/// What has so many containers each.
const AT_A_TIME: usize = 50;
const LAUNCHERS: usize = 4;
const BUSYBOX: &str = "test.local/busybox:latest";
const SOON: Duration = Duration::from_secs(20);
/// Tells this program to be the plain server, on the address that follows.
const PLAIN: &str = "TROUPE_BENCH_PLAIN";

fn main() -> ExitCode {
    if let Ok(addr) = std::env::var(PLAIN) {
        return report::finish(plain_server(&addr).map(|()| true));
    }
    report::main(&[
        ("throughput", throughput),
        ("latency", latency),
        ("bounds", bounds),
        ("neighbour", neighbour),
        ("density", density),
    ])
}

fn throughput(host: &Host) -> Result<bool> {
    let client = host.containerd()?.namespace("throughput");
    let plain = Plain::start()?;
    let (mut rates, mut kept) = (Vec::new(), true);
    for (what, file, path, settings, promise) in [
        ("hello, a fresh instance for each request", "/hello-http.wasm", "/", &[][..], 0.35),
        ("web (its heap grows), a fresh instance for each request", "/web.wasm", "/hello", &[], 0.25),
        (
            "web, an instance for 1000 requests",
            "/web.wasm",
            "/hello",
            &["WASMTIME_HTTP_PROXY_INSTANCE_REUSE=1000"],
            0.60,
        ),
    ] {
        let served = Served::start(&client, file, settings)?;
        let short = |addr, path| Ok::<_, anyhow::Error>(wrk_for(addr, path, "1")?.rate);
        let pairs = samples(PAIRS, || Ok((short(served.addr, path)?, short(plain.addr, "/")?)))?;
        rates.extend(pairs.iter().map(|(_, plain)| *plain));
        let ratios: Vec<f64> = pairs.into_iter().map(|(ours, plain)| ours / plain).collect();
        println!("{}", spread(&ratios));
        kept &= at_least(what, median(ratios), "x", promise);
    }
    println!("a plain hyper server: {:.0} requests a second", median(rates));
    Ok(kept)
}

/// At half of what each server can do beside this client: what a request waits when there is no queue to speak of. What it can
/// do is looked up before every sample: a shared machine is another one after a minute.
fn latency(host: &Host) -> Result<bool> {
    let client = host.containerd()?.namespace("latency");
    let plain = Plain::start()?;
    let mut kept = true;
    for (name, file, path) in [("hello", "/hello-http.wasm", "/"), ("web", "/web.wasm", "/hello")] {
        let served = Served::start(&client, file, &[])?;
        let all = samples(PAIRS, || Waits::take((served.addr, path), (plain.addr, "/")))?;
        let half = median(all.iter().map(|waits| waits.half).collect());
        let plain_half = median(all.iter().map(|waits| waits.plain_half).collect());
        let p99 = |of: fn(&Waits) -> &[Duration]| paced::p99(all.iter().flat_map(of).copied());
        let (ours, theirs) = (p99(|waits| &waits.ours)?, p99(|waits| &waits.theirs)?);
        println!("{name} at {half:.0} requests a second: p99 {ours:.3} ms; plain at {plain_half:.0}: {theirs:.3} ms");
        kept &= at_most(&format!("{name}: p99 at half the maximum rate, beside plain"), ours / theirs, "x", 3.0);
    }
    Ok(kept)
}

/// How long requests took at half of each server's maximum, within a few seconds.
struct Waits {
    half: f64,
    plain_half: f64,
    ours: Vec<Duration>,
    theirs: Vec<Duration>,
}

impl Waits {
    fn take((addr, path): (SocketAddr, &str), (plain, root): (SocketAddr, &str)) -> Result<Self> {
        let (half, plain_half) = (paced::maximum(addr, path)? / 2.0, paced::maximum(plain, root)? / 2.0);
        let (ours, theirs) = (paced::times(addr, path, half)?, paced::times(plain, root, plain_half)?);
        Ok(Self { half, plain_half, ours, theirs })
    }
}

fn bounds(host: &Host) -> Result<bool> {
    let client = host.containerd()?.namespace("bounds");
    let explicit = Served::start(&client, "/web.wasm", &["WASMTIME_HTTP_PROXY_BOUNDS_CHECKS=explicit"])?;
    let guarded = Served::start(&client, "/web.wasm", &["WASMTIME_HTTP_PROXY_BOUNDS_CHECKS=guarded"])?;
    for (what, path) in [
        ("/hello (nothing to compute)", "/hello"),
        ("/json?items=200 (a few hundred microseconds)", "/json?items=200"),
        ("/hash?rounds=20 (milliseconds)", "/hash?rounds=20"),
    ] {
        let mut ratios = Vec::new();
        for _ in 0..ROUNDS {
            ratios.push(wrk(guarded.addr, path)?.rate / wrk(explicit.addr, path)?.rate);
        }
        println!("guard pages beside explicit bounds checks, {what:<45} {:>5.2} x the requests", median(ratios));
    }
    Ok(true)
}

fn neighbour(host: &Host) -> Result<bool> {
    let client = host.containerd()?.namespace("neighbour");
    let healthy = Served::start(&client, "/web.wasm", &[])?;
    let noisy = Served::start(&client, "/web.wasm", &["WASMTIME_HTTP_PROXY_REQUEST_TIMEOUT=500ms"])?;
    let alone = wrk(healthy.addr, "/hello")?;
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let mut kept = true;
    for spinners in [cores, 4 * cores] {
        let noise = wrk_command(noisy.addr, "/spin", &spinners.to_string(), "6").spawn()?;
        let beside = wrk(healthy.addr, "/hello");
        let output = noise.wait_with_output()?;
        let beside = beside?;
        if !String::from_utf8_lossy(&output.stdout).contains("Non-2xx") {
            bail!("the noisy neighbour made no noise");
        }
        println!("{spinners} spinning requests: p99 {:.1} ms, alone {:.1} ms", beside.p99, alone.p99);
        kept &= at_most("p99 of a healthy container beside spinning requests", beside.p99, "ms", 50.0);
        kept &= at_least("its throughput, of what it has alone", beside.rate / alone.rate, "x", 0.25);
    }
    Ok(kept)
}

fn density(host: &Host) -> Result<bool> {
    let containerd = host.containerd()?;
    let native = native_rate(&containerd.namespace("native"))?;
    let client = containerd.namespace("density");
    // The first ones pay for what all share.
    let mut served = vec![Served::start(&client, "/web.wasm", &[])?, Served::start(&client, "/web.wasm", &[])?];
    for one in &served {
        fetch(one.addr)?;
    }
    let daemon = client.daemon()?;
    let before = report::pss_kib(daemon)?;
    let offset = containerd.log_length();
    let (containers, rate) = launch_many(IDLE_CONTAINERS, || Served::launch(&client, "/web.wasm", &[]))?;
    for container in containers {
        let addr = addr_of(containerd, offset, &container.id)?;
        served.push(Served { addr, _container: container });
    }
    let idle = (report::pss_kib(daemon)?.saturating_sub(before)) as f64 / IDLE_CONTAINERS as f64;
    for one in &served {
        fetch(one.addr)?;
    }
    let used = (report::pss_kib(daemon)?.saturating_sub(before)) as f64 / IDLE_CONTAINERS as f64;
    println!(
        "{IDLE_CONTAINERS} http containers in a daemon of {before} KiB; {used:.0} KiB each after a request to all"
    );
    println!("native containers started the same way, by runc: {native:.1} a second");
    let mut kept = at_most("PSS of a further idle http container", idle, "KiB", 100.0);
    kept &= at_least("http containers started by ctr run -d", rate, "/s", 30.0);
    Ok(kept)
}

/// Native containers a second, with an image and the host's network as those of wasm.
fn native_rate(client: &Client<'_>) -> Result<f64> {
    let busybox = format!("{}:/bin/busybox", report::busybox()?.display());
    client.import(BUSYBOX, &image::pack("busybox", &[&guests::built("hello.wasm")?], &["--file", &busybox])?)?;
    let sleeper = || client.image(BUSYBOX, &["/bin/busybox", "sleep", "600"]).runtime("io.containerd.runc.v2");
    let (containers, rate) = launch_many(NATIVE_CONTAINERS, || sleeper().flag("--net-host").detached())?;
    drop(containers);
    Ok(rate)
}

/// By several clients at once, as a kubelet would; and how many a second, while the cores were there.
fn launch_many<'a>(
    count: usize,
    launch: impl Fn() -> Result<Container<'a>> + Sync,
) -> Result<(Vec<Container<'a>>, f64)> {
    let (stretch, begin) = (Stretch::begin()?, Instant::now());
    let one = || Ok((begin.elapsed(), stretch.stolen()?, launch()?));
    let some = || (0..count / LAUNCHERS).map(|_| one()).collect();
    let mut launched = std::thread::scope(|scope| {
        let launchers: Vec<_> = (0..LAUNCHERS).map(|_| scope.spawn(some)).collect();
        let joined =
            launchers.into_iter().map(|launcher| launcher.join().map_err(|_| anyhow!("a launcher panicked"))?);
        let launched = joined.collect::<Result<Vec<Vec<_>>>>()?;
        Ok::<_, anyhow::Error>(launched.into_iter().flatten().collect::<Vec<_>>())
    })?;
    let (end, stolen) = (begin.elapsed(), stretch.stolen()?);
    launched.sort_by_key(|(begun, ..)| *begun);
    println!("{count} containers in {end:.1?}, of which {stolen:.1?} of a core were stolen");
    // From the beginning of one to that of another, some later.
    let marks = launched.iter().map(|(begun, stolen, _)| (*begun, *stolen)).step_by(AT_A_TIME).chain([(end, stolen)]);
    let marks: Vec<_> = marks.collect();
    let mut parts: Vec<_> = marks.windows(2).map(|pair| (pair[1].1 - pair[0].1, pair[1].0 - pair[0].0)).collect();
    parts.sort();
    parts.truncate(parts.len().div_ceil(2));
    let time: Duration = parts.iter().map(|(_, time)| *time).sum();
    let rate = (parts.len() * AT_A_TIME) as f64 / time.as_secs_f64();
    Ok((launched.into_iter().map(|(.., container)| container).collect(), rate))
}

/// A container that serves.
struct Served<'a> {
    addr: SocketAddr,
    _container: Container<'a>,
}

impl<'a> Served<'a> {
    fn start(client: &Client<'a>, file: &str, env: &[&str]) -> Result<Self> {
        client.import(image::GUESTS, &image::guests()?)?;
        let offset = client.containerd.log_length();
        let container = Self::launch(client, file, env)?;
        let addr = addr_of(client.containerd, offset, &container.id)?;
        Ok(Self { addr, _container: container })
    }

    /// One `ctr run`; the image is there.
    fn launch(client: &Client<'a>, file: &str, env: &[&str]) -> Result<Container<'a>> {
        let mut run = client.image(image::GUESTS, &[file]).flag("--net-host");
        for variable in ["WASMTIME_HTTP_PROXY_SOCKET_ADDR=127.0.0.1:0"].iter().chain(env) {
            run = run.option("--env", variable);
        }
        run.detached()
    }
}

/// The address that a container chose, from the log of its daemon.
fn addr_of(containerd: &Containerd, offset: u64, id: &str) -> Result<SocketAddr> {
    let name = format!("/{id} addr=");
    wait::until("a server to listen", SOON, || {
        let log = containerd.whole_log_since(offset);
        let line = log.lines().find_map(|line| line.split_once(&name));
        Ok(line.and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok()))
    })
}

fn fetch(addr: SocketAddr) -> Result<()> {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--fail", "--max-time", "5", &format!("http://{addr}/hello")]);
    job::run(curl, SOON)?.success("curl").map(drop)
}

/// What `wrk` saw.
struct Load {
    /// Requests a second.
    rate: f64,
    /// Milliseconds.
    p99: f64,
}

fn wrk_command(addr: SocketAddr, path: &str, connections: &str, seconds: &str) -> Command {
    let mut command = Command::new("wrk");
    command.args(["-t1", "-c", connections, "-d", seconds, "--latency", "--timeout", "10s"]);
    command.arg(format!("http://{addr}{path}")).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn wrk(addr: SocketAddr, path: &str) -> Result<Load> {
    wrk_for(addr, path, SECONDS)
}

fn wrk_for(addr: SocketAddr, path: &str, seconds: &str) -> Result<Load> {
    let output = wrk_command(addr, path, CONNECTIONS, seconds).output().context("no wrk; install it (Debian: wrk)")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if text.contains("Non-2xx") || text.contains("Socket errors") {
        bail!("requests to {path} failed: {text}");
    }
    // A word may also be part of another figure.
    let after = |word: &str| text.lines().find_map(|line| line.trim_start().strip_prefix(word)).map(str::trim);
    let rate = after("Requests/sec:").and_then(|rate| rate.parse().ok());
    let p99 = after("99%").and_then(millis);
    Ok(Load { rate: rate.with_context(|| text.clone())?, p99: p99.with_context(|| text.clone())? })
}

/// A time as wrk prints it.
fn millis(text: &str) -> Option<f64> {
    let (number, factor) = match text {
        _ if text.ends_with("us") => (&text[..text.len() - 2], 0.001),
        _ if text.ends_with("ms") => (&text[..text.len() - 2], 1.0),
        _ => (text.strip_suffix('s')?, 1000.0),
    };
    Some(number.parse::<f64>().ok()? * factor)
}

/// The plain server, as a process of its own.
struct Plain {
    addr: SocketAddr,
    child: Child,
}

impl Plain {
    fn start() -> Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        let addr = listener.local_addr()?;
        drop(listener);
        let child = Command::new(std::env::current_exe()?).env(PLAIN, addr.to_string()).spawn()?;
        let plain = Self { addr, child };
        wait::until_true("the plain server to listen", SOON, || Ok(std::net::TcpStream::connect(addr).is_ok()))?;
        Ok(plain)
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // It has no end of its own.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What hyper can do: a static body, on tokio's usual runtime.
fn plain_server(addr: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(addr).await?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            tokio::spawn(async move {
                let answer = service_fn(|_| async {
                    Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"hello\n"))))
                });
                // A client that leaves is no matter here.
                let _ = http1::Builder::new().pipeline_flush(true).serve_connection(TokioIo::new(stream), answer).await;
            });
        }
    })
}
