//! A client that sends at a fixed rate, whatever the server does: `wrk` sends the next request when the last was answered,
//! so a slow answer hides the requests that should have been sent meanwhile.
//!
//! A time counts from the moment a request was due, also while it waits for a connection. One thread over epoll: a thread
//! for each connection costs the machine more than the server does.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{Timespec, epoll};

const CONNECTIONS: usize = 32;
/// What is measured; what comes before warms the server up.
const LASTS: Duration = Duration::from_secs(3);
const WARMS: Duration = Duration::from_millis(300);

/// The 99th percentile of the times of answers, in milliseconds, at so many requests a second.
pub fn p99(addr: SocketAddr, path: &str, rate: f64) -> Result<f64> {
    let mut client = Client::connect(addr, path)?;
    // The kernel would have this thread sleep 50 us longer than it asks for, as it sees fit.
    rustix::thread::set_current_timer_slack(NonZeroU64::new(1))?;
    let interval = Duration::from_secs_f64(1.0 / rate);
    let begin = Instant::now();
    let (measured, end) = (begin + WARMS, begin + WARMS + LASTS);
    let mut due = begin;
    loop {
        let now = Instant::now();
        while due <= now && due < end {
            client.send(due)?;
            due += interval;
        }
        if due >= end && client.is_quiet() {
            break;
        }
        ensure!(now < end + LASTS, "the server cannot keep up with {rate:.0} a second");
        client.answers(if due < end { due.saturating_duration_since(now) } else { LASTS })?;
    }
    let mut times: Vec<Duration> =
        client.times.into_iter().filter(|(due, _)| *due >= measured).map(|(_, time)| time).collect();
    times.sort_unstable();
    let p99 = times.get(times.len() * 99 / 100).context("no answer")?;
    Ok(p99.as_secs_f64() * 1000.0)
}

struct Client {
    request: Vec<u8>,
    connections: Vec<Connection>,
    poll: std::os::fd::OwnedFd,
    /// Connections without a request, requests without a connection.
    idle: Vec<usize>,
    waiting: VecDeque<Instant>,
    /// When each was due, and how long it took from there.
    times: Vec<(Instant, Duration)>,
}

struct Connection {
    stream: TcpStream,
    due: Option<Instant>,
    answer: Vec<u8>,
}

impl Client {
    fn connect(addr: SocketAddr, path: &str) -> Result<Self> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut connections = Vec::new();
        for number in 0..CONNECTIONS {
            let stream = TcpStream::connect(addr)?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            let data = epoll::EventData::new_u64(number as u64);
            epoll::add(&poll, &stream, data, epoll::EventFlags::IN | epoll::EventFlags::ET)?;
            connections.push(Connection { stream, due: None, answer: Vec::with_capacity(4096) });
        }
        let request = format!("GET {path} HTTP/1.1\r\nHost: {addr}\r\n\r\n").into_bytes();
        let idle = (0..CONNECTIONS).collect();
        Ok(Self { request, connections, poll, idle, waiting: VecDeque::new(), times: Vec::new() })
    }

    fn send(&mut self, due: Instant) -> Result<()> {
        let Some(number) = self.idle.pop() else {
            self.waiting.push_back(due);
            return Ok(());
        };
        let connection = &mut self.connections[number];
        connection.due = Some(due);
        // So small, it fits into the socket's buffer at once.
        Ok(connection.stream.write_all(&self.request)?)
    }

    fn is_quiet(&self) -> bool {
        self.waiting.is_empty() && self.idle.len() == CONNECTIONS
    }

    /// Takes the answers that come within this time.
    fn answers(&mut self, within: Duration) -> Result<()> {
        let mut events = Vec::with_capacity(CONNECTIONS);
        let within = Timespec::try_from(within)?;
        epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), Some(&within))?;
        for event in events {
            let number = usize::try_from(event.data.u64())?;
            if self.connections[number].read()? {
                let due = self.connections[number].due.take().context("an answer without a request")?;
                self.times.push((due, due.elapsed()));
                self.idle.push(number);
                if let Some(due) = self.waiting.pop_front() {
                    self.send(due)?;
                }
            }
        }
        Ok(())
    }
}

impl Connection {
    /// Whether the answer is complete now.
    fn read(&mut self) -> Result<bool> {
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => bail!("the server closed the connection"),
                Ok(length) => self.answer.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        let whole = is_whole(&self.answer);
        if whole {
            ensure!(self.answer.starts_with(b"HTTP/1.1 200"), "not answered with 200");
            self.answer.clear();
        }
        Ok(whole)
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
        })?;
        Some(body.len() >= length)
    };
    whole().unwrap_or(false)
}
