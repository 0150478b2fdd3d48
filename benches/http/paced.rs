//! A client that sends at a fixed rate, whatever the server does: `wrk` sends the next request when the last was answered,
//! so a slow answer hides the requests that should have been sent meanwhile.
//!
//! A time counts from the moment a request was due. One blocking thread a connection: the kernel's timers are finer than
//! those of a runtime.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

const CONNECTIONS: u32 = 32;
const LASTS: Duration = Duration::from_secs(3);

/// The 99th percentile of the times of answers, in milliseconds, at so many requests a second.
pub fn p99(addr: SocketAddr, path: &str, rate: f64) -> Result<f64> {
    let interval = Duration::from_secs_f64(f64::from(CONNECTIONS) / rate);
    let begin = Instant::now() + Duration::from_millis(50);
    let mut times = std::thread::scope(|scope| {
        let client = |number: u32| move || connection(addr, path, begin + interval * number / CONNECTIONS, interval);
        let clients: Vec<_> = (0..CONNECTIONS).map(|number| scope.spawn(client(number))).collect();
        let joined = clients.into_iter().map(|client| client.join().map_err(|_| anyhow!("a client panicked"))?);
        Ok::<_, anyhow::Error>(joined.collect::<Result<Vec<_>>>()?.concat())
    })?;
    ensure!(
        times.len() as f64 >= 0.95 * rate * LASTS.as_secs_f64(),
        "the server cannot keep up with {rate:.0} a second"
    );
    times.sort_unstable();
    Ok(times[times.len() * 99 / 100].as_secs_f64() * 1000.0)
}

fn connection(addr: SocketAddr, path: &str, begin: Instant, interval: Duration) -> Result<Vec<Duration>> {
    let mut stream = TcpStream::connect(addr)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {addr}\r\n\r\n");
    let (mut times, mut answer) = (Vec::new(), [0; 4096]);
    let mut due = begin;
    while due < begin + LASTS {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        stream.write_all(request.as_bytes())?;
        let mut length = 0;
        while !is_whole(&answer[..length]) {
            let read = stream.read(&mut answer[length..])?;
            ensure!(read > 0, "the server closed the connection");
            length += read;
        }
        ensure!(answer.starts_with(b"HTTP/1.1 200"), "not answered with 200");
        times.push(due.elapsed());
        due += interval;
    }
    Ok(times)
}

/// Whether all of an answer that declares its length is here.
fn is_whole(answer: &[u8]) -> bool {
    let whole = || -> Option<bool> {
        let text = std::str::from_utf8(answer).ok()?;
        let (head, body) = text.split_once("\r\n\r\n")?;
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("content-length").then(|| value.parse::<usize>().ok())?
        });
        Some(body.len() >= length.context("no length").ok()?)
    };
    whole().unwrap_or(false)
}
