//! Instances of WASI 0.3: each may serve several requests, side by side.
//!
//! ```text
//! request ─▶ Instances::ask ─┬─ an open instance ── a seat in it
//!                            └─ none: a new one ─── and its life, a future that somebody has to poll
//! ```
//! The guest's tasks run inside of their instance, so an instance has a life of its own: it goes on after an answer as long
//! as the guest has something to do, and a request only waits for it.
//!
//! Invariants. An instance is asked by at most `reuse` requests in its life. It is closed to further ones by the last of
//! them, by a guest that computes (the others would wait for it), by a request that was given up (nothing but the end of
//! its instance stops its guest), by old age and by a drain. It ends when nobody waits for it and its guest has nothing to
//! do, or has taken too long about it.
//!
//! Called by `serving.rs`; a request's part is in `service.rs`.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::time::Sleep;
use wasmtime::component::{Accessor, AccessorTask};
use wasmtime_wasi_http::WasiBody;
use wasmtime_wasi_http::p3::bindings::{Service, ServicePre};

use super::engine::Kind;
use super::exchange::{Exchange, Failure};
use super::service;
use super::visitor::{self, Host, Visitor};

/// Requests that an instance serves at the same time; all of them share one core.
const SIDE_BY_SIDE: usize = 16;

/// How long instances live.
#[derive(Debug, Clone, Copy)]
pub struct Reuse {
    /// Requests that an instance serves.
    pub requests: u32,
    /// How long it waits for the next one.
    pub idle: Duration,
    /// How long a guest may go on after its answers; `None` is as long as it likes.
    pub patience: Option<Duration>,
    /// The most of them at once.
    pub limit: usize,
}

/// The instances of a container.
pub(super) struct Instances {
    reuse: Reuse,
    /// Those that take further requests.
    open: Mutex<Vec<Open>>,
    living: AtomicUsize,
    /// Every request gets an instance of its own from here on.
    is_closed: AtomicBool,
}

/// An instance as long as it takes requests.
struct Open {
    instance: Arc<Instance>,
    queue: mpsc::UnboundedSender<Visit>,
    asked: u32,
    idle: Option<Instant>,
}

/// A request on its way into an instance.
pub(super) struct Visit {
    pub request: http::Request<WasiBody>,
    pub exchange: Arc<Exchange>,
}

/// What an instance's life and its requests know of each other.
struct Instance {
    seats: Mutex<Seats>,
    /// Where it began: requests of other threads would have to wake this one.
    thread: ThreadId,
}

#[derive(Default)]
struct Seats {
    /// Its requests. The sender is dropped when a request has been answered.
    taken: Vec<(Arc<Exchange>, oneshot::Sender<()>)>,
    /// A guest runs for nobody.
    is_abandoned: bool,
    /// The guest has something to do.
    is_busy: bool,
    /// Wait for a change.
    waiting: Vec<Waker>,
}

impl Instances {
    pub fn new(reuse: Reuse) -> Arc<Self> {
        let (open, living, is_closed) = (Mutex::default(), AtomicUsize::new(0), AtomicBool::new(false));
        Arc::new(Self { reuse, open, living, is_closed })
    }

    /// Hands a request to an instance. If one had to be made, its life comes along, which somebody has to poll.
    ///
    /// # Errors
    /// `Crowded`, when there are as many as there may be.
    pub fn ask(
        self: &Arc<Self>,
        pre: &ServicePre<Visitor>,
        host: &Arc<Host>,
        number: u64,
        visit: Visit,
    ) -> Result<(Seat, Option<impl Future<Output = ()> + Send + 'static>), Failure> {
        let is_full = self.living.load(Ordering::Relaxed) >= self.reuse.limit;
        let here = thread::current().id();
        let mut open = self.lock();
        let fits = |open: &Open| (is_full || open.instance.thread == here) && open.instance.has_room();
        if let Some(at) = open.iter().position(fits) {
            let seat = self.seat(&open[at].instance, &visit.exchange);
            open[at].idle = None;
            open[at].asked += 1;
            // Heard: its life keeps the other end while it is in this list.
            let _ = open[at].queue.send(visit);
            if open[at].asked >= self.reuse.requests {
                drop(open.swap_remove(at));
            }
            return Ok((seat, None));
        }
        if is_full {
            return Err(Failure::Crowded(format!("{} instances are at work", self.reuse.limit)));
        }
        let instance = Arc::new(Instance { seats: Mutex::default(), thread: here });
        let seat = self.seat(&instance, &visit.exchange);
        let (queue, visits) = mpsc::unbounded_channel();
        let _ = queue.send(visit);
        let is_fresh = self.reuse.requests < 2;
        if !is_fresh && !self.is_closed.load(Ordering::Acquire) {
            open.push(Open { instance: Arc::clone(&instance), queue, asked: 1, idle: None });
        }
        drop(open);
        let life = Life::new(Arc::clone(self), instance);
        // What several share bears no request's name.
        let number = is_fresh.then_some(number);
        Ok((seat, Some(life.run(pre.clone(), Arc::clone(host), number, visits))))
    }

    /// Closes those that nobody came for.
    pub fn cool_down(&self) {
        let now = Instant::now();
        self.lock().retain(|open| open.idle.is_none_or(|since| now - since < self.reuse.idle));
    }

    /// Closes all, now and from now on.
    pub fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        self.lock().clear();
    }

    fn seat(self: &Arc<Self>, instance: &Arc<Instance>, exchange: &Arc<Exchange>) -> Seat {
        let (end, done) = oneshot::channel();
        instance.seats().taken.push((Arc::clone(exchange), end));
        Seat { instances: Arc::clone(self), instance: Arc::clone(instance), exchange: Arc::clone(exchange), done }
    }

    fn shut(&self, instance: &Arc<Instance>) {
        self.lock().retain(|open| !Arc::ptr_eq(&open.instance, instance));
    }

    /// Notes whether an instance waits for its next request.
    fn note(&self, instance: &Arc<Instance>, is_idle: bool) {
        if let Some(open) = self.lock().iter_mut().find(|open| Arc::ptr_eq(&open.instance, instance)) {
            open.idle = is_idle.then(|| open.idle.unwrap_or_else(Instant::now));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request's wait for its part in an instance. Dropped before that, it gives the request up.
pub(super) struct Seat {
    instances: Arc<Instances>,
    instance: Arc<Instance>,
    exchange: Arc<Exchange>,
    done: oneshot::Receiver<()>,
}

impl Seat {
    /// Waits until the guest has answered, or its instance has ended.
    pub async fn wait(mut self) {
        // Nothing is ever sent: what there is to say, the exchange was told.
        let _ = (&mut self.done).await;
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.instance.is_seated(&self.exchange) {
            // Before it may end: no request may come too late.
            self.instances.shut(&self.instance);
            self.instance.leave(&self.exchange, true);
            self.exchange.stop(Failure::Stopped);
        }
    }
}

impl Instance {
    fn has_room(&self) -> bool {
        self.seats().taken.len() < SIDE_BY_SIDE
    }

    fn is_seated(&self, exchange: &Arc<Exchange>) -> bool {
        self.seats().taken.iter().any(|(taken, _)| Arc::ptr_eq(taken, exchange))
    }

    /// A request is over, for the guest too or not.
    fn leave(&self, exchange: &Arc<Exchange>, is_abandoned: bool) {
        let mut seats = self.seats();
        if let Some(at) = seats.taken.iter().position(|(taken, _)| Arc::ptr_eq(taken, exchange)) {
            seats.taken.swap_remove(at);
            seats.is_abandoned |= is_abandoned;
            seats.waiting.drain(..).for_each(Waker::wake);
        }
    }

    /// Notes whether the guest has something to do, from inside.
    fn look(&self, accessor: &Accessor<Visitor>, cx: &mut Context<'_>) {
        let is_busy = accessor.poll_no_interesting_tasks(cx).is_pending();
        self.seats().is_busy = is_busy;
    }

    /// The next request; `None` when there will be none and the guest has nothing to do.
    fn poll_next(
        &self,
        accessor: &Accessor<Visitor>,
        visits: &mut mpsc::UnboundedReceiver<Visit>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Visit>> {
        let visit = visits.poll_recv(cx);
        if let Poll::Ready(Some(_)) = visit {
            return visit;
        }
        self.look(accessor, cx);
        let mut seats = self.seats();
        if visit.is_ready() && seats.taken.is_empty() && !seats.is_busy {
            return Poll::Ready(None);
        }
        seats.wait(cx);
        Poll::Pending
    }

    fn seats(&self) -> MutexGuard<'_, Seats> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seats {
    fn wait(&mut self, cx: &Context<'_>) {
        if !self.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            self.waiting.push(cx.waker().clone());
        }
    }
}

/// A request inside its instance.
struct Task {
    visit: Visit,
    service: Arc<Service>,
    instance: Arc<Instance>,
}

impl AccessorTask<Visitor> for Task {
    async fn run(self, accessor: &Accessor<Visitor>) -> wasmtime::Result<()> {
        let Visit { request, exchange } = self.visit;
        service::serve(accessor, &self.service, request, &exchange).await?;
        self.instance.leave(&exchange, false);
        Ok(())
    }
}

/// An instance's life. Dropped, it ends all requests in it.
struct Life {
    instances: Arc<Instances>,
    instance: Arc<Instance>,
    /// Runs while the guest goes on though all are answered.
    late: Option<Pin<Box<Sleep>>>,
}

impl Life {
    fn new(instances: Arc<Instances>, instance: Arc<Instance>) -> Self {
        instances.living.fetch_add(1, Ordering::Relaxed);
        Self { instances, instance, late: None }
    }

    async fn run(
        mut self,
        pre: ServicePre<Visitor>,
        host: Arc<Host>,
        number: Option<u64>,
        visits: mpsc::UnboundedReceiver<Visit>,
    ) {
        let Err(error) = self.live(&pre, &host, number, visits).await else { return };
        // No request comes any more, and those that are here have failed.
        self.instances.shut(&self.instance);
        let failed = Err(error);
        for (exchange, _) in self.instance.seats().taken.drain(..) {
            exchange.settle(&failed);
        }
    }

    async fn live(
        &mut self,
        pre: &ServicePre<Visitor>,
        host: &Arc<Host>,
        number: Option<u64>,
        mut visits: mpsc::UnboundedReceiver<Visit>,
    ) -> wasmtime::Result<()> {
        let mut store = visitor::store(pre.engine(), Kind::Concurrent, host, number);
        let service = Arc::new(pre.instantiate_async(&mut store).await?);
        let instance = Arc::clone(&self.instance);
        let mut inside = pin!(store.run_concurrent(async |accessor| {
            while let Some(visit) = poll_fn(|cx| instance.poll_next(accessor, &mut visits, cx)).await {
                let (service, instance) = (Arc::clone(&service), Arc::clone(&instance));
                accessor.spawn(Task { visit, service, instance })?;
            }
            Ok(())
        }));
        // Polled from outside as well: while a guest computes, nothing inside is.
        poll_fn(|cx| match inside.as_mut().poll(cx) {
            Poll::Ready(outcome) => Poll::Ready(outcome.flatten()),
            Poll::Pending => self.poll_over(cx).map(Ok),
        })
        .await
    }

    /// Ready when whatever the guest still does, it does for nobody.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let (is_empty, is_busy, is_abandoned) = {
            let mut seats = self.instance.seats();
            seats.wait(cx);
            (seats.taken.is_empty(), seats.is_busy, seats.is_abandoned)
        };
        if visitor::is_spinning() {
            self.instances.shut(&self.instance);
        } else {
            self.instances.note(&self.instance, is_empty && !is_busy);
        }
        match (is_empty, is_busy, self.instances.reuse.patience) {
            (true, ..) if is_abandoned => Poll::Ready(()),
            (true, true, Some(patience)) => {
                let late = self.late.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
                ready!(late.as_mut().poll(cx));
                self.instances.shut(&self.instance);
                // One that came at the last moment is served.
                if self.instance.seats().taken.is_empty() { Poll::Ready(()) } else { Poll::Pending }
            }
            (true, true, None) => Poll::Pending,
            (false, ..) | (_, false, _) => {
                self.late = None;
                Poll::Pending
            }
        }
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.instances.living.fetch_sub(1, Ordering::Relaxed);
        self.instances.shut(&self.instance);
        for (exchange, _) in self.instance.seats().taken.drain(..) {
            exchange.stop(Failure::Stopped);
        }
    }
}
