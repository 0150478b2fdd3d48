//! A client that sends at a fixed rate, whatever the server does: `wrk` sends the next request when the last was answered,
//! so a slow answer hides the requests that should have been sent meanwhile.
//!
//! A time counts from the moment a request was due. One blocking thread a connection: the kernel's timers are finer than
//! those of a runtime. They share the cores with the server, so what a server can do is measured with this client as well:
//! half of what another one gets out of it may be nearly all that is left beside this one.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

const CONNECTIONS: u32 = 32;
/// Short, so that there are enough which nobody disturbs; long enough for thousands of requests.
const LASTS: Duration = Duration::from_millis(500);

/// How many requests a second a server answers when each connection's next one follows at once.
pub fn maximum(addr: SocketAddr, path: &str) -> Result<f64> {
    let end = Instant::now() + LASTS;
    let answered = all(|_| {
        let mut connection = Connection::open(addr, path)?;
        let mut answered = 0_u32;
        while Instant::now() < end {
            connection.ask()?;
            answered += 1;
        }
        Ok(f64::from(answered))
    })?;
    Ok(answered.iter().sum::<f64>() / LASTS.as_secs_f64())
}

/// The 99th percentile of the times of answers, in milliseconds, at so many requests a second.
pub fn p99(addr: SocketAddr, path: &str, rate: f64) -> Result<f64> {
    let interval = Duration::from_secs_f64(f64::from(CONNECTIONS) / rate);
    let begin = Instant::now() + Duration::from_millis(50);
    let mut times = all(|number| {
        let mut connection = Connection::open(addr, path)?;
        let (mut times, mut due) = (Vec::new(), begin + interval * number / CONNECTIONS);
        while due < begin + LASTS {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            connection.ask()?;
            times.push(due.elapsed());
            due += interval;
        }
        Ok(times)
    })?
    .concat();
    times.sort_unstable();
    Ok(times[times.len() * 99 / 100].as_secs_f64() * 1000.0)
}

/// Runs `client` for each connection, numbered, all at once.
fn all<T: Send>(client: impl Fn(u32) -> Result<T> + Sync) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let client = &client;
        let clients: Vec<_> = (0..CONNECTIONS).map(|number| scope.spawn(move || client(number))).collect();
        clients.into_iter().map(|client| client.join().map_err(|_| anyhow!("a client panicked"))?).collect()
    })
}

struct Connection {
    stream: TcpStream,
    request: String,
    answer: [u8; 4096],
}

impl Connection {
    fn open(addr: SocketAddr, path: &str) -> Result<Self> {
        let stream = TcpStream::connect(addr)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {addr}\r\n\r\n");
        Ok(Self { stream, request, answer: [0; 4096] })
    }

    /// Sends a request and reads the whole answer.
    fn ask(&mut self) -> Result<()> {
        self.stream.write_all(self.request.as_bytes())?;
        let mut length = 0;
        while !is_whole(&self.answer[..length]) {
            let read = self.stream.read(&mut self.answer[length..])?;
            ensure!(read > 0, "the server closed the connection");
            length += read;
        }
        ensure!(self.answer.starts_with(b"HTTP/1.1 200"), "not answered with 200");
        Ok(())
    }
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
