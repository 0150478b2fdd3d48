//! What a pod costs, made through CRI with a network of its own: `cargo bench --bench pods`.
//!
//! | section | question | promise |
//! |---|---|---|
//! | density | what does a further http pod cost its daemon, and what its network the kernel? | 200 KiB |
//! | ready | from RunPodSandbox to the first answer, beside the same pod with a native server and runc | ratio ≤ 0.6 |
//!
//! Medians. Needs root, runc, a static busybox and CNI's plugins (Debian: containernetworking-plugins).

#[expect(dead_code, reason = "the tests use the rest of it")]
#[path = "../tests/common/mod.rs"]
mod common;
#[expect(dead_code, reason = "other benches use the rest of it")]
mod report;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use common::cri::{Kubelet, Pod};
use common::{guests, image, proc};
use report::{Host, at_most, median};

const PODS: usize = 50;
const PAIRS: usize = 15;
/// A native server that every Debian has.
const BUSYBOX: &str = "test.local/busybox:latest";
/// Long enough for any first answer.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    report::main(&[("density", density), ("ready", ready)])
}

/// Each pod has answered a request before it is counted.
fn density(host: &Host) -> Result<bool> {
    let kubelet = Kubelet::connect(host.node()?)?;
    let one = || -> Result<Pod<'_>> {
        let pod = kubelet.run(kubelet.pod("dense")?)?;
        pod.web("web", &[])?;
        answer(&kubelet, &pod)?;
        Ok(pod)
    };
    // The first ones pay for what all share: the engine, the code, the threads.
    let mut pods = vec![one()?, one()?];
    let daemon = proc::group_leader(pods[0].pid()?)?;
    let (before, slab) = (report::pss_kib(daemon)?, unreclaimable()?);
    let begin = Instant::now();
    for _ in 0..PODS {
        pods.push(one()?);
    }
    let took = begin.elapsed().as_secs_f64() / PODS as f64;
    let each = (report::pss_kib(daemon)?.saturating_sub(before)) as f64 / PODS as f64;
    let kernel = (unreclaimable()?.saturating_sub(slab)) as f64 / PODS as f64;
    println!("{PODS} further pods, {:.0} ms each until they answered, CNI's programs included", took * 1000.0);
    println!("the kernel's own memory (slab, percpu, stacks) for each, the machine over: {kernel:.0} KiB");
    let kept = at_most("PSS of a further http pod", each, "KiB", 200.0);
    pods.into_iter().try_for_each(Pod::remove)?;
    Ok(kept)
}

fn ready(host: &Host) -> Result<bool> {
    let containerd = host.node()?;
    let kubelet = Kubelet::connect(containerd)?;
    let page = containerd.folder().join("index.html");
    fs::write(&page, "hello\n")?;
    let busybox = format!("{}:/bin/busybox", report::busybox()?.display());
    let page = format!("{}:/www/index.html", page.display());
    let hello = guests::built("hello.wasm")?;
    let tar = image::pack("busybox", &[&hello], &["--file", &busybox, "--file", &page])?;
    kubelet.import(BUSYBOX, &tar)?;
    let ours = || timed(&kubelet, "wasmtime", image::GUESTS, &["/hello-http.wasm"]);
    let theirs = || timed(&kubelet, "runc", BUSYBOX, &["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"]);
    // Keeps the daemon, as the other pods of a node do.
    let keeps = kubelet.run(kubelet.pod("keeps")?)?;
    ours()?;
    theirs()?;
    let (mut wasm, mut runc, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let pair = (ours()?, theirs()?);
        wasm.push(pair.0);
        runc.push(pair.1);
        ratios.push(pair.0 / pair.1);
    }
    keeps.remove()?;
    println!("a pod's first answer: wasm {:.0} ms, busybox httpd with runc {:.0} ms", median(wasm), median(runc));
    Ok(at_most("RunPodSandbox to the first answer, beside runc", median(ratios), "x", 0.6))
}

/// From RunPodSandbox to the first answer, in milliseconds.
fn timed(kubelet: &Kubelet<'_>, handler: &str, image: &str, words: &[&str]) -> Result<f64> {
    let config = kubelet.pod("ready")?;
    let begin = Instant::now();
    let pod = kubelet.run_with(config, handler)?;
    let server = pod.container("server", image, words, |_| {})?;
    server.start()?;
    answer(kubelet, &pod)?;
    let took = begin.elapsed().as_secs_f64() * 1000.0;
    pod.remove()?;
    Ok(took)
}

/// The first answer of a pod's server, asked for until it listens.
fn answer(kubelet: &Kubelet<'_>, pod: &Pod<'_>) -> Result<()> {
    let addr = SocketAddr::new(pod.ip()?, 8080);
    kubelet.node()?.inside(|| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match TcpStream::connect_timeout(&addr, PATIENCE) {
                Ok(mut stream) => {
                    stream.set_read_timeout(Some(PATIENCE))?;
                    stream.write_all(b"GET / HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n")?;
                    let mut head = [0; 12];
                    stream.read_exact(&mut head)?;
                    ensure!(head.starts_with(b"HTTP/1."), "{head:?}");
                    return Ok(());
                }
                // Nobody listens yet: nothing tells when somebody does.
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_micros(500)),
                Err(error) => bail!("{addr}: {error}"),
            }
        }
    })
}

/// What the kernel keeps for itself, in KiB, the whole machine over.
fn unreclaimable() -> Result<u64> {
    let table = fs::read_to_string("/proc/meminfo")?;
    let of = |name: &str| -> Result<u64> {
        let line = table.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
        Ok(line.split_whitespace().next().context("no figure")?.parse()?)
    };
    Ok(of("SUnreclaim:")? + of("Percpu:")? + of("KernelStack:")?)
}
