//! One `wasi:http` container: listens, accepts, drains.
//!
//! ```text
//! serve ─▶ accept ──▶ a connection task on a worker
//!   └ a signal ─▶ drain: take what is in the backlog, close the listener, tell the connections
//!                   ├─ all done                     exit 0
//!                   └─ timeout, a second signal ─▶ cut, exit 128+n
//! ```
//! Invariant: whatever the kernel had accepted for us before the signal is answered. The listener is closed only when its
//! queue is empty, and new connections are kept out meanwhile.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;
use rustix::net::{SocketFlags, acceptfrom_with};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::admission::{Admission, Slots};
use super::bell::{Bell, Phase};
use super::connection;
use super::progress::FAREWELL;
use super::settings::HttpSettings;
use super::workers::Workers;
use crate::guest::{Entrance, Failure, Outcome, Serving, Stage};
use crate::sharded::Counter;
use crate::signals::Signals;
use crate::stdio::{Output, Streams, watched};

/// After a failed `accept` (no descriptors left, say): the next one would fail at once as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What a reader of the log that stalls has at least, after a server has drained.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A server at work.
pub struct Server {
    name: String,
    settings: HttpSettings,
    serving: Arc<Serving>,
    workers: Arc<Workers>,
    admission: Admission,
    stage: Arc<Stage>,
    streams: Streams,
    /// Connections, and guests that outlive their first turn.
    tasks: TaskTracker,
    /// For the connections.
    bell: Bell,
    /// For everything else: a drain has begun.
    drain: CancellationToken,
    /// For everything else: it is over.
    cut: CancellationToken,
    /// On a line of its own: every request changes it.
    numbers: CachePadded<AtomicU64>,
    finished: Counter,
    broken: AtomicU64,
    /// Requests were refused since the last line about it.
    crowded: AtomicBool,
    /// Lines of ours that the reader of the container's log missed and the operator was not told of yet.
    lost: AtomicU64,
}

/// What a server shares with the others of the process.
pub struct Threads {
    pub workers: Arc<Workers>,
    pub slots: Arc<Slots>,
    pub stage: Arc<Stage>,
}

impl Server {
    /// A server that nobody can reach yet.
    pub fn new(
        name: String,
        settings: HttpSettings,
        serving: Arc<Serving>,
        Threads { workers, slots, stage }: Threads,
        streams: Streams,
    ) -> Arc<Self> {
        Arc::new(Self {
            name,
            serving,
            workers,
            admission: Admission::new(slots, settings.max_concurrent_requests),
            settings,
            stage,
            streams,
            tasks: TaskTracker::new(),
            bell: Bell::default(),
            drain: CancellationToken::new(),
            cut: CancellationToken::new(),
            numbers: CachePadded::new(AtomicU64::new(1)),
            finished: Counter::default(),
            broken: AtomicU64::new(0),
            crowded: AtomicBool::new(false),
            lost: AtomicU64::new(0),
        })
    }

    /// Serves until a signal ends it. Tells how it ended, and how long its last output may still take.
    pub async fn serve(
        self: &Arc<Self>,
        listener: TcpListener,
        signals: &mut watch::Receiver<Signals>,
    ) -> (Outcome, Duration) {
        let addr = listener.local_addr();
        let listener = match watched(listener.into(), Interest::READABLE) {
            Ok(listener) => listener,
            Err(error) => return (Outcome::HostFailed(format!("watch the listener: {error}")), LAST_WORDS),
        };
        if let Ok(addr) = addr {
            tracing::info!(container = %self.name, %addr, "listening");
        }
        let room = Arc::new(Semaphore::new(self.settings.max_connections));
        let first = tokio::select! {
            biased;
            first = told(signals, 1) => first,
            () = self.accept_all(&listener, &room) => SIGKILL,
            () = self.cool_down() => SIGKILL,
        };
        if first == SIGKILL {
            return (self.cut_off(SIGKILL).await, Duration::ZERO);
        }
        let begun = Instant::now();
        let outcome = self.drain(first, listener, signals).await;
        let patience = match outcome {
            Outcome::Killed(_) => Duration::ZERO,
            _ => self.settings.drain_timeout.saturating_sub(begun.elapsed()).max(LAST_WORDS),
        };
        (outcome, patience)
    }

    async fn accept_all(self: &Arc<Self>, listener: &AsyncFd<OwnedFd>, room: &Arc<Semaphore>) {
        let mut is_failing = false;
        loop {
            // Never closed. Whoever comes now waits in the backlog.
            let Ok(permit) = Arc::clone(room).acquire_owned().await else { return };
            match listener.async_io(Interest::READABLE, accept).await {
                Ok((stream, peer)) => {
                    is_failing = false;
                    self.connected(stream, peer, Some(permit));
                }
                Err(error) => {
                    // One line when it begins: it may go on for long.
                    if !std::mem::replace(&mut is_failing, true) {
                        tracing::warn!(container = %self.name, %error, "connections cannot be accepted; they wait");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn connected(
        self: &Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        room: Option<tokio::sync::OwnedSemaphorePermit>,
    ) {
        let place = if self.serving.shares_instances() { self.workers.one() } else { self.workers.any() };
        let runtime = place.runtime.clone();
        let server = Arc::clone(self);
        let task = async move {
            let _held = (place, room);
            match tokio::net::TcpStream::from_std(stream) {
                Ok(stream) => connection::serve(server, stream, peer).await,
                Err(error) => tracing::warn!(container = %server.name, %error, "a connection cannot be served"),
            }
        };
        drop(self.tasks.spawn_on(task, &runtime));
    }

    /// Instances that wait for a next request grow old.
    async fn cool_down(&self) {
        if self.settings.instance_reuse < 2 {
            return std::future::pending().await;
        }
        let mut tick = tokio::time::interval(self.settings.instance_idle_timeout);
        loop {
            tick.tick().await;
            self.serving.cool_down();
        }
    }

    async fn drain(
        self: &Arc<Self>,
        signal: u8,
        listener: AsyncFd<OwnedFd>,
        signals: &mut watch::Receiver<Signals>,
    ) -> Outcome {
        let begun = Instant::now();
        let (finished, broken) = (self.finished.total(), self.broken.load(Ordering::Relaxed));
        tracing::info!(container = %self.name, signal, requests = self.admission.running(), "draining");
        self.close(listener);
        self.serving.close();
        self.drain.cancel();
        self.bell.ring(Phase::Draining);
        self.tasks.close();
        let forced = tokio::select! {
            biased;
            () = self.tasks.wait() => None,
            second = told(signals, 2) => Some(second),
            () = tokio::time::sleep(self.settings.drain_timeout) => Some(signal),
        };
        let outcome = match forced {
            None => Outcome::Exited(0),
            Some(signal) => self.cut_off(signal).await,
        };
        tracing::info!(
            container = %self.name,
            finished = self.finished.total() - finished,
            cut = self.broken.load(Ordering::Relaxed) - broken,
            elapsed_ms = begun.elapsed().as_millis() as u64,
            code = outcome.code(),
            "drained"
        );
        outcome
    }

    /// Takes what waits in the backlog, and lets nobody else in.
    fn close(self: &Arc<Self>, listener: AsyncFd<OwnedFd>) {
        let listener = listener.into_inner();
        if let Err(error) = super::gate::shut(&listener) {
            tracing::warn!(container = %self.name, %error, "connections that arrive right now may be reset");
        }
        while let Ok((stream, peer)) = accept(&listener) {
            self.connected(stream, peer, None);
        }
    }

    async fn cut_off(&self, signal: u8) -> Outcome {
        self.serving.close();
        self.drain.cancel();
        self.cut.cancel();
        self.bell.ring(Phase::Cut);
        self.tasks.close();
        self.tasks.wait().await;
        Outcome::Killed(signal)
    }

    /// The container's name, for the log.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn settings(&self) -> &HttpSettings {
        &self.settings
    }

    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    pub fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Where guests go that compute.
    pub fn background(&self) -> &Handle {
        self.workers.background()
    }

    /// Requests are numbered from one.
    pub fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// The way of a connection's requests to their guests.
    pub fn entrance(&self) -> Arc<Entrance> {
        self.serving.entrance(&self.stage.ticker)
    }

    /// Stops one guest; the end of the drain stops all.
    pub fn leash(&self) -> CancellationToken {
        self.cut.child_token()
    }

    pub fn is_draining(&self) -> bool {
        self.bell.phase() != Phase::Serving
    }

    /// For connections: how far a drain is.
    pub fn bell(&self) -> &Bell {
        &self.bell
    }

    /// Waits until a connection that never said anything need not be waited for.
    pub async fn silence(&self) {
        self.drain.cancelled().await;
        tokio::time::sleep(FAREWELL).await;
    }

    /// A request is over.
    pub fn ended(&self, complete: bool) {
        if complete {
            self.finished.add(1);
        } else {
            self.broken.fetch_add(1, Ordering::Relaxed);
        }
        if self.crowded.load(Ordering::Relaxed) && self.admission.running() == 0 {
            self.crowded.store(false, Ordering::Relaxed);
        }
    }

    /// One line when overload begins, not one for each request that is refused.
    pub fn overloaded(&self) {
        if !self.crowded.swap(true, Ordering::Relaxed) {
            let (running, limit) = (self.admission.running(), self.admission.limit());
            tracing::warn!(container = %self.name, running, limit, "overload: requests are answered with 503");
        }
    }

    /// A line about a request that failed, for the operator and for the reader of the container's log; there a guest's own
    /// trace follows.
    pub fn report(&self, request: u64, target: &str, failure: &Failure) {
        if matches!(failure, Failure::Stopped) {
            return tracing::debug!(container = %self.name, request, target, %failure, "a request was stopped");
        }
        let text = failure.to_string();
        let cause = text.lines().next_back().unwrap_or_default().trim();
        tracing::warn!(container = %self.name, request, target, cause, "a request failed");
        let trace = if text.contains('\n') { format!("{text}\n") } else { String::new() };
        self.note(&self.streams.stderr, &format!("request {request} {target}: {cause}\n{trace}"));
    }

    /// A line of the access log.
    pub fn log(&self, line: &str) {
        self.note(&self.streams.stdout, line);
    }

    /// Into the container's log. Nobody waits for a reader that is far behind; the operator is told what it will not see.
    fn note(&self, output: &Arc<Output>, line: &str) {
        if !output.line(line) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        } else if self.lost.load(Ordering::Relaxed) > 0 {
            let lines = self.lost.swap(0, Ordering::Relaxed);
            tracing::warn!(container = %self.name, lines, "lost: the reader of the container's log was too slow");
        }
    }
}

const SIGKILL: u8 = 9;

/// The next connection, ready for any runtime.
fn accept(listener: &OwnedFd) -> std::io::Result<(TcpStream, SocketAddr)> {
    let (stream, peer) = acceptfrom_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    let peer = peer.and_then(|peer| SocketAddr::try_from(peer).ok());
    Ok((stream.into(), peer.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0)))))
}

/// Waits for the signal of this number in turn. SIGKILL comes before its turn.
async fn told(signals: &mut watch::Receiver<Signals>, turn: u32) -> u8 {
    let told = signals.wait_for(|signals| signals.count >= turn || signals.last == SIGKILL).await;
    // The owner is gone without a word: the process is being torn down.
    told.map_or(SIGKILL, |signals| signals.last)
}
