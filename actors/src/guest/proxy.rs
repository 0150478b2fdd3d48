//! A loaded server, and one request's visit to an instance of it.
//!
//! ```text
//! begin ─▶ Flight (a future: instance ─▶ call ─▶ settle)      polled by whoever serves the connection
//!                     │ answers through
//!                     ▼
//!                 Exchange ─▶ the connection
//! ```
//! Invariant: an instance serves one request at a time, and (without `INSTANCE_REUSE`) one in its life. Dropping a flight
//! stops its guest at once and gives the instance back; the exchange then says so.
//!
//! Called by `http`.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::Body;
use wasmtime::component::{Component, InstancePre, Linker};
use wasmtime::{Engine, Store};
use wasmtime_wasi_http::WasiHttpView;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme;
use wasmtime_wasi_http::p2::bindings::{Proxy, ProxyPre};
use wasmtime_wasi_http::p3::bindings::ServicePre;

use super::LoadError;
use super::engine::{Engines, Kind};
use super::epoch::{Clock, Driven, Ticker};
use super::exchange::{Exchange, Failure};
use super::pool::IDLE_INSTANCES;
use super::swap::Watch;
use super::visitor::{self, Host, Visitor};

/// A component that serves requests, linked once for all containers that run it.
pub struct Server {
    ready: Ready,
    /// The same on an engine that stays right when pages leave memory; made if that ever happens.
    remapping: OnceLock<Option<Ready>>,
    engines: Engines,
    kind: Kind,
}

/// Linked; what is left is a memory and a stack.
pub(super) enum Ready {
    /// `wasi:http/incoming-handler@0.2.x`.
    Proxy(ProxyPre<Visitor>),
    /// `wasi:http/handler@0.3.x`.
    Service(ServicePre<Visitor>),
}

impl Server {
    /// Links a component, or gives it back when it is no server.
    ///
    /// # Errors
    /// `Unlinkable`, naming the import that nobody provides.
    pub(super) fn link(engines: &Engines, kind: Kind, component: &Component) -> Result<Option<Self>, LoadError> {
        if !Ready::fits(component) {
            return Ok(None);
        }
        let ready = Ready::link(kind, component).map_err(|e| super::program::missing(&e))?;
        Ok(Some(Self { ready, remapping: OnceLock::new(), engines: engines.clone(), kind }))
    }

    pub(super) fn engine(&self) -> &Engine {
        self.ready.engine()
    }

    /// What is safe to use now.
    fn ready(&self) -> &Ready {
        if !matches!(self.kind, Kind::Http(_)) || Watch::get().is_resident() {
            return &self.ready;
        }
        self.remapping.get_or_init(|| self.relink()).as_ref().unwrap_or(&self.ready)
    }

    fn relink(&self) -> Option<Ready> {
        let engine = self.engines.get_remapping(self.kind).ok()?;
        if Engine::same(&engine, self.ready.engine()) {
            return None;
        }
        let code = self.ready.component().serialize().ok()?;
        // SAFETY: the bytes are those of a component that runs in this process, and engines of one kind run the same code.
        let component = unsafe { Component::deserialize(&engine, code) };
        let relinked = component.and_then(|component| Ready::link(self.kind, &component));
        relinked.inspect_err(|error| tracing::error!(%error, "a server cannot be moved to the safe engine")).ok()
    }
}

impl Ready {
    fn fits(component: &Component) -> bool {
        let engine = component.engine();
        component.component_type().exports(engine).any(|(name, _)| {
            name.starts_with("wasi:http/incoming-handler@0.2") || name.starts_with("wasi:http/handler@0.3")
        })
    }

    fn link(kind: Kind, component: &Component) -> wasmtime::Result<Self> {
        let engine = component.engine();
        let mut linker = Linker::<Visitor>::new(engine);
        visitor::link(&mut linker, kind)?;
        let pre = linker.instantiate_pre(component)?;
        match ServicePre::new(pre.clone()) {
            Ok(service) => Ok(Self::Service(service)),
            Err(_) => ProxyPre::new(pre).map(Self::Proxy),
        }
    }

    fn pre(&self) -> &InstancePre<Visitor> {
        match self {
            Self::Proxy(pre) => pre.instance_pre(),
            Self::Service(pre) => pre.instance_pre(),
        }
    }

    fn component(&self) -> &Component {
        self.pre().component()
    }

    fn engine(&self) -> &Engine {
        self.pre().engine()
    }
}

/// A server and the container it serves for.
pub struct Serving {
    program: Arc<super::Program>,
    host: Arc<Host>,
    warm: Warm,
}

impl Serving {
    /// `reuse` requests are served by an instance, one after another, if the next comes within `idle`.
    pub fn new(program: Arc<super::Program>, host: Host, reuse: u32, idle: Duration) -> Arc<Self> {
        Arc::new(Self { program, host: Arc::new(host), warm: Warm { reuse, idle, instances: Mutex::default() } })
    }

    /// The visit of one request, not yet begun: it goes on as far as the flight is polled.
    pub fn begin<B>(self: &Arc<Self>, ticker: &Ticker, number: u64, request: http::Request<B>) -> Flight
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<wasmtime_wasi_http::Error>,
    {
        let exchange = Exchange::new();
        let (serving, answers) = (Arc::clone(self), Answers(Arc::clone(&exchange)));
        let mut guest = ticker.drive(Arc::clone(&self.host.cpu), async move {
            serving.visit(number, request, answers).await;
        });
        guest.time_by(Clock::Wall);
        Flight { exchange, guest }
    }

    /// Lets go of instances that wait for nothing.
    pub fn cool_down(&self) {
        self.warm.cool_down();
    }

    async fn visit<B>(&self, number: u64, request: http::Request<B>, answers: Answers)
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<wasmtime_wasi_http::Error>,
    {
        let super::Program::Server(server) = &*self.program else {
            return answers.0.stop(Failure::Host("the program is no server".into()));
        };
        match server.ready() {
            Ready::Proxy(pre) => self.call(pre, server.kind, number, request, &answers.0).await,
            Ready::Service(pre) => super::service::call(pre, &self.host, number, request, &answers.0).await,
        }
    }

    async fn call<B>(
        &self,
        pre: &ProxyPre<Visitor>,
        kind: Kind,
        number: u64,
        request: http::Request<B>,
        exchange: &Arc<Exchange>,
    ) where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<wasmtime_wasi_http::Error>,
    {
        let mut instance = match self.warm.take(pre.engine()) {
            Some(mut instance) => {
                instance.store.data_mut().turn_to(number);
                visitor::first_turn(&mut instance.store);
                instance
            }
            None => {
                let mut store = visitor::store(pre.engine(), kind, &self.host, number);
                match pre.instantiate_async(&mut store).await {
                    Ok(proxy) => Instance { store, proxy, served: 0, idle: None },
                    Err(error) => return exchange.settle(&Err(error)),
                }
            }
        };
        let outcome = instance.serve(request, exchange).await;
        // Looks at the body while the store lives.
        exchange.settle(&outcome);
        if outcome.is_ok() {
            self.warm.keep(instance);
        }
    }
}

/// Whoever waits for a guest that is dropped on its way hears of it.
struct Answers(Arc<Exchange>);

impl Drop for Answers {
    fn drop(&mut self) {
        self.0.stop(Failure::Stopped);
    }
}

struct Instance {
    store: Store<Visitor>,
    proxy: Proxy,
    served: u32,
    /// Idle since then.
    idle: Option<(Instant, IdleSlot)>,
}

/// One of the slots of the pool that are for idle instances.
struct IdleSlot;

static IDLE: AtomicU32 = AtomicU32::new(0);

impl IdleSlot {
    fn take() -> Option<Self> {
        let slot = (IDLE.fetch_add(1, Ordering::Relaxed) < IDLE_INSTANCES).then_some(Self);
        if slot.is_none() {
            IDLE.fetch_sub(1, Ordering::Relaxed);
        }
        slot
    }
}

impl Drop for IdleSlot {
    fn drop(&mut self) {
        IDLE.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Instance {
    async fn serve<B>(&mut self, request: http::Request<B>, exchange: &Arc<Exchange>) -> wasmtime::Result<()>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<wasmtime_wasi_http::Error>,
    {
        self.served += 1;
        let scheme = match request.uri().scheme_str() {
            Some("https") => Scheme::Https,
            _ => Scheme::Http,
        };
        let answers = Arc::clone(exchange);
        let mut view = self.store.data_mut().http();
        let request = view.new_incoming_request(scheme, request)?;
        let out = view.new_response_outparam_from_callback(move |answer| answers.set(answer))?;
        self.proxy.wasi_http_incoming_handler().call_handle(&mut self.store, request, out).await
    }
}

/// Instances between two requests (`INSTANCE_REUSE`).
struct Warm {
    reuse: u32,
    idle: Duration,
    /// The last one back is the first one out: its memory is warm, and those nobody needs grow old.
    instances: Mutex<Vec<Instance>>,
}

impl Warm {
    fn take(&self, engine: &Engine) -> Option<Instance> {
        if self.reuse < 2 {
            return None;
        }
        let mut instance = self.lock().pop()?;
        instance.idle = None;
        Engine::same(instance.store.engine(), engine).then_some(instance)
    }

    fn keep(&self, mut instance: Instance) {
        if instance.served < self.reuse
            && let Some(slot) = IdleSlot::take()
        {
            instance.idle = Some((Instant::now(), slot));
            self.lock().push(instance);
        }
    }

    fn cool_down(&self) {
        let now = Instant::now();
        let is_old = |instance: &Instance| instance.idle.as_ref().is_some_and(|(since, _)| now - *since >= self.idle);
        // The oldest are at the bottom. Dropped after the lock.
        let old: Vec<Instance> = {
            let mut instances = self.lock();
            let count = instances.iter().take_while(|instance| is_old(instance)).count();
            instances.drain(..count).collect()
        };
        drop(old);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Instance>> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request on its visit.
pub struct Flight {
    exchange: Arc<Exchange>,
    guest: Driven<()>,
}

/// What a poll of a flight came to.
pub enum Step {
    /// The guest has ended; the exchange says how.
    Landed,
    /// It waits, for its client or its timers.
    Waiting,
    /// It used up its turn: from here on it belongs among those that compute.
    Spinning,
}

impl Flight {
    /// Where its answer is.
    pub fn exchange(&self) -> &Arc<Exchange> {
        &self.exchange
    }

    /// Goes on with the guest.
    pub fn step(&mut self, cx: &mut Context<'_>) -> Step {
        // Not somebody else's on this thread.
        visitor::spun();
        match Pin::new(&mut self.guest).poll(cx) {
            Poll::Ready(()) => Step::Landed,
            Poll::Pending if visitor::spun() => {
                self.guest.time_by(Clock::Cpu);
                Step::Spinning
            }
            Poll::Pending => Step::Waiting,
        }
    }
}
