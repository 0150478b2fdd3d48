//! A client that sends at a fixed rate, whatever the server does: `wrk` sends the next request when the last was answered,
//! so a slow answer hides the requests that should have been sent meanwhile.
//!
//! A time counts from the moment a request was due. One thread waits for all connections: with a thread for each, a figure
//! says as much about how the kernel chooses among 32 of them on the server's cores.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

const CONNECTIONS: u32 = 32;
/// Short, so that there are enough which nobody disturbs; long enough for thousands of requests.
const LASTS: Duration = Duration::from_millis(500);
/// For an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How many requests a second a server answers when each connection's next one follows at once.
pub fn maximum(addr: SocketAddr, path: &str) -> Result<f64> {
    let mut client = Client::connect(addr, path)?;
    client.connections.iter_mut().try_for_each(Connection::ask)?;
    let (begin, mut answered) = (Instant::now(), 0_u32);
    while begin.elapsed() < LASTS {
        for number in client.wait(PATIENCE)? {
            let connection = &mut client.connections[number];
            if connection.receive()? {
                answered += 1;
                connection.ask()?;
            }
        }
    }
    Ok(f64::from(answered) / begin.elapsed().as_secs_f64())
}

/// How long answers took, at so many requests a second.
pub fn times(addr: SocketAddr, path: &str, rate: f64) -> Result<Vec<Duration>> {
    let mut client = Client::connect(addr, path)?;
    let interval = Duration::from_secs_f64(f64::from(CONNECTIONS) / rate);
    let begin = Instant::now();
    for (number, connection) in (0..).zip(&mut client.connections) {
        connection.due = begin + interval * number / CONNECTIONS;
    }
    let mut times = Vec::new();
    while let Some(pause) = client.ask_what_is_due(begin + LASTS)? {
        for number in client.wait(pause)? {
            let connection = &mut client.connections[number];
            if connection.receive()? {
                times.push(connection.due.elapsed());
                connection.due += interval;
            }
        }
    }
    Ok(times)
}

/// The 99th percentile of all samples' times together, in milliseconds: that of each sample, and the middle of these, would not
/// show what happens in some of the samples only.
pub fn p99(times: impl Iterator<Item = Duration>) -> Result<f64> {
    let mut times: Vec<_> = times.collect();
    times.sort_unstable();
    Ok(times.get(times.len() * 99 / 100).context("no answers")?.as_secs_f64() * 1000.0)
}

struct Client {
    connections: Vec<Connection>,
    epoll: OwnedFd,
    /// Ends a wait: a timeout of epoll's own would be rounded to a millisecond.
    timer: OwnedFd,
}

/// What the timer is among the connections.
const TIMER: u64 = u64::MAX;

impl Client {
    fn connect(addr: SocketAddr, path: &str) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
        epoll::add(&epoll, &timer, epoll::EventData::new_u64(TIMER), epoll::EventFlags::IN)?;
        let connections = (0..CONNECTIONS).map(|number| {
            let connection = Connection::open(addr, path)?;
            let data = epoll::EventData::new_u64(number.into());
            epoll::add(&epoll, &connection.stream, data, epoll::EventFlags::IN)?;
            Ok(connection)
        });
        Ok(Self { connections: connections.collect::<Result<_>>()?, epoll, timer })
    }

    /// Sends what is due; how long until the next is, or `None` after all were answered that are due before the end.
    fn ask_what_is_due(&mut self, end: Instant) -> Result<Option<Duration>> {
        let (now, mut pause) = (Instant::now(), None);
        for connection in &mut self.connections {
            let left = if connection.is_asked {
                PATIENCE
            } else if connection.due >= end {
                continue;
            } else if connection.due <= now {
                connection.ask()?;
                PATIENCE
            } else {
                connection.due - now
            };
            pause = Some(pause.map_or(left, |pause: Duration| pause.min(left)));
        }
        Ok(pause)
    }

    /// The connections on which something came within that time.
    fn wait(&self, pause: Duration) -> Result<Vec<usize>> {
        // Zero would be no timer at all.
        let it_value = Timespec::try_from(pause.max(Duration::from_nanos(1)))?;
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value })?;
        let mut events = Vec::with_capacity(self.connections.len() + 1);
        epoll::wait(&self.epoll, spare_capacity(&mut events), None)?;
        let numbers = events.iter().map(|event: &epoll::Event| event.data.u64()).filter(|number| *number != TIMER);
        let numbers: Vec<usize> = numbers.map(|number| number as usize).collect();
        ensure!(pause < PATIENCE || !numbers.is_empty(), "no answer within {PATIENCE:?}");
        Ok(numbers)
    }
}

struct Connection {
    stream: TcpStream,
    request: String,
    answer: [u8; 4096],
    length: usize,
    is_asked: bool,
    /// When its next request is to be sent, or should have been.
    due: Instant,
}

impl Connection {
    fn open(addr: SocketAddr, path: &str) -> Result<Self> {
        let stream = TcpStream::connect(addr)?;
        stream.set_nodelay(true)?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: {addr}\r\n\r\n");
        Ok(Self { stream, request, answer: [0; 4096], length: 0, is_asked: false, due: Instant::now() })
    }

    fn ask(&mut self) -> Result<()> {
        self.stream.write_all(self.request.as_bytes())?;
        (self.is_asked, self.length) = (true, 0);
        Ok(())
    }

    /// Reads what has come, once; whether that was the rest of the answer.
    fn receive(&mut self) -> Result<bool> {
        let read = self.stream.read(&mut self.answer[self.length..])?;
        ensure!(read > 0, "the server closed the connection");
        self.length += read;
        let answer = &self.answer[..self.length];
        self.is_asked = !is_whole(answer);
        ensure!(self.is_asked || answer.starts_with(b"HTTP/1.1 200"), "not answered with 200");
        Ok(!self.is_asked)
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
