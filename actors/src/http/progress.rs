//! What one connection is doing, and how long it may.
//!
//! Reads, writes and requests note the time; nothing here waits. `connection.rs` asks when its timer fires.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BufMut;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use rustix::time::{ClockId, clock_gettime};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::server::Server;
use crate::guest::Entrance;
use crate::stdio::watched;

/// In a drain an idle connection stays this long: a request may be on its way to it, and closing at once would lose it.
pub const FAREWELL: Duration = Duration::from_millis(100);

/// What a connection is doing, noted by its reads, writes and requests. All times in milliseconds since it was accepted.
///
/// Requests of HTTP/2 are tasks of their own, on any thread. Who sees that a head is complete sees its request, and who sees
/// that a request is over sees when.
///
/// Requests reach their server through it: the references they count are this connection's and nobody else's.
pub struct Progress {
    server: Arc<Server>,
    entrance: Arc<Entrance>,
    peer: SocketAddr,
    accepted: Instant,
    /// The same by the coarse clock.
    began: Duration,
    /// The last byte read or written.
    last: AtomicU64,
    /// The first byte of a head that is not complete; zero is none.
    head: AtomicU64,
    requests: AtomicU32,
    served: AtomicBool,
    /// The client does not take what is written.
    blocked: AtomicBool,
    goodbye: AtomicBool,
    /// A guest works on a request for longer than a turn.
    long: AtomicBool,
}

/// What the timer of a connection found.
pub enum Expired {
    No,
    Farewell,
    Dead(&'static str),
}

impl Progress {
    /// A connection that was accepted just now.
    pub fn new(server: Arc<Server>, peer: SocketAddr) -> Arc<Self> {
        Arc::new(Self {
            entrance: server.entrance(),
            server,
            peer,
            accepted: Instant::now(),
            began: coarse(),
            last: AtomicU64::new(0),
            head: AtomicU64::new(0),
            requests: AtomicU32::new(0),
            served: AtomicBool::new(false),
            blocked: AtomicBool::new(false),
            goodbye: AtomicBool::new(false),
            long: AtomicBool::new(false),
        })
    }

    /// Whose connection it is.
    pub fn server(&self) -> &Arc<Server> {
        &self.server
    }

    /// The way to the server's guests.
    pub fn entrance(&self) -> &Arc<Entrance> {
        &self.entrance
    }

    /// A place for a request, if it may run now.
    pub fn admit(self: &Arc<Self>) -> Option<Permit> {
        self.server.admission().enter().then(|| Permit(Arc::clone(self)))
    }

    /// Who is at the other end.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// A request begins.
    pub fn begun(&self) {
        self.served.store(true, Ordering::Relaxed);
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.head.store(0, Ordering::Release);
    }

    /// A guest goes on with a request: from here on it matters at once if the client leaves.
    pub fn takes_long(&self) {
        self.long.store(true, Ordering::Relaxed);
    }

    /// Whether the client's end has to be looked for. HTTP/2 reads whatever happens, and sees it.
    fn is_watched(&self) -> bool {
        self.long.load(Ordering::Relaxed) && !self.goodbye.load(Ordering::Relaxed)
    }

    /// A request has its answer, or never will.
    pub fn ended(&self) {
        self.long.store(false, Ordering::Relaxed);
        self.last.store(self.now(), Ordering::Relaxed);
        self.requests.fetch_sub(1, Ordering::Release);
    }

    /// Its protocol can end without losing what is on its way.
    pub fn says_goodbye_itself(&self) {
        self.goodbye.store(true, Ordering::Relaxed);
    }

    /// A connection with a request in flight is told too: its answer then says that it is the last.
    pub fn may_close_at_once(&self) -> bool {
        self.goodbye.load(Ordering::Relaxed) || self.has_requests()
    }

    /// No request, and none that begins.
    pub fn is_idle(&self) -> bool {
        !self.has_begun_a_head() && !self.has_requests()
    }

    /// A head is on its way.
    pub fn has_begun_a_head(&self) -> bool {
        self.head.load(Ordering::Acquire) > 0
    }

    fn has_requests(&self) -> bool {
        self.requests.load(Ordering::Acquire) > 0
    }

    fn now(&self) -> u64 {
        u64::try_from(coarse().saturating_sub(self.began).as_millis()).unwrap_or(u64::MAX)
    }

    fn read(&self) {
        let now = self.now();
        self.last.store(now, Ordering::Relaxed);
        // HTTP/2 has much to say between requests (SETTINGS, WINDOW_UPDATE, PING): only its first request has to hurry.
        let is_chatting = self.goodbye.load(Ordering::Relaxed) && self.served.load(Ordering::Relaxed);
        if self.is_idle() && !is_chatting {
            self.head.store(now.max(1), Ordering::Relaxed);
        }
    }

    fn wrote(&self, blocked: bool) {
        self.blocked.store(blocked, Ordering::Relaxed);
        if !blocked {
            self.last.store(self.now(), Ordering::Relaxed);
        }
    }

    /// When the timer has to look, at first and whenever the phase changes: what begins meanwhile may have less time.
    pub fn look(&self, told: bool) -> Instant {
        self.deadline(told).min(Instant::now() + self.server.settings().idle_timeout)
    }

    /// How long what the connection is doing may take.
    fn deadline(&self, told: bool) -> Instant {
        let settings = self.server.settings();
        let (since, patience) = if self.blocked.load(Ordering::Relaxed) {
            (self.last.load(Ordering::Relaxed), settings.idle_timeout)
        } else if self.has_requests() {
            // The request has deadlines of its own; look whether the client still reads.
            (self.now(), settings.idle_timeout)
        } else if self.has_begun_a_head() {
            (self.head.load(Ordering::Relaxed), settings.header_timeout)
        } else if told {
            (self.last.load(Ordering::Relaxed), FAREWELL)
        } else if !self.served.load(Ordering::Relaxed) {
            (0, settings.header_timeout)
        } else {
            (self.last.load(Ordering::Relaxed), settings.idle_timeout)
        };
        self.accepted + Duration::from_millis(since) + patience
    }

    /// The same, but not at once again: what has expired is being dealt with.
    pub fn next_look(&self, told: bool) -> Instant {
        self.look(told).max(Instant::now() + FAREWELL)
    }

    /// What is due now.
    pub fn expired(&self, told: bool) -> Expired {
        if Instant::now() < self.deadline(told) {
            return Expired::No;
        }
        if self.blocked.load(Ordering::Relaxed) {
            return Expired::Dead("the client does not read");
        }
        if self.has_requests() {
            return Expired::No;
        }
        if self.has_begun_a_head() {
            return Expired::Dead("the head of a request takes too long");
        }
        match (told, self.served.load(Ordering::Relaxed)) {
            (true, _) => Expired::Farewell,
            (false, false) => Expired::Dead("no request came"),
            (false, true) => Expired::Dead("idle"),
        }
    }
}

/// Some milliseconds late at worst, which no timeout here minds; asked three times for each request.
fn coarse() -> Duration {
    clock_gettime(ClockId::MonotonicCoarse).try_into().unwrap_or_default()
}

/// A request's place among those that may run at once; given back when dropped.
pub struct Permit(Arc<Progress>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.server.admission().leave();
    }
}

/// A head and a body of so many bytes together go out in one piece: to copy them costs less than to hand the kernel a list
/// (0.25 us of 6.9).
const SMALL: usize = 512;

/// The connection's bytes, watched.
pub struct Io {
    stream: TokioIo<TcpStream>,
    progress: Arc<Progress>,
    /// Ready when the client has closed its side. hyper reads no further than its guest does, and would not see it behind a
    /// body that nobody reads.
    left: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Read for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        self.progress.read();
        Poll::Ready(Ok(()))
    }
}

impl Io {
    /// `stream`, whose reads and writes `progress` notes.
    pub fn new(stream: TcpStream, progress: Arc<Progress>) -> Self {
        Self { stream: TokioIo::new(stream), progress, left: None }
    }

    fn has_left(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.progress.is_watched() {
            self.left = None;
            return false;
        }
        let stream = self.stream.inner();
        let left = self.left.get_or_insert_with(|| {
            let own = stream.as_fd().try_clone_to_owned();
            Box::pin(async move {
                match own.and_then(|own| Ok(watched(own, Interest::READABLE)?)) {
                    // Not what can be read: that the other side is closed.
                    Ok(own) => drop(own.ready(Interest::PRIORITY).await),
                    // No descriptors left: it will be seen later.
                    Err(_) => std::future::pending().await,
                }
            })
        });
        left.as_mut().poll(cx).is_ready()
    }

    fn note(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.progress.wrote(written.is_pending());
        written
    }
}

impl Write for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.note(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = slices.iter().map(|slice| slice.len()).sum();
        let written = match [0; SMALL].get_mut(..length) {
            Some(piece) => {
                let mut rest = &mut *piece;
                slices.iter().for_each(|slice| rest.put_slice(slice));
                Pin::new(&mut self.stream).poll_write(cx, piece)
            }
            None => Pin::new(&mut self.stream).poll_write_vectored(cx, slices),
        };
        self.note(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.has_left(cx) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
