//! One request's visit to an instance of a server.
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

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::Body;
use http_body_util::BodyExt;
use wasmtime::component::Resource;
use wasmtime_wasi_http::WasiHttpView;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme;
use wasmtime_wasi_http::p2::types::{HostIncomingRequest, HostResponseOutparam};

use super::epoch::{Clock, Driven, Driver, Ticker};
use super::exchange::{Exchange, Failure};
use super::proxy::Ready;
use super::shared::{Instances, Reuse, Visit};
use super::visitor::{self, Host};
use super::warm::{Instance, Warm};

/// A server and the container it serves for.
pub struct Serving {
    program: Arc<super::Program>,
    host: Host,
    /// Of a guest of WASI 0.2.
    warm: Warm,
    /// Of one of WASI 0.3.
    instances: Arc<Instances>,
}

/// A connection's way in. What its requests hold on to is counted here and not where other cores count, which cost a small
/// request a twentieth of its time.
pub struct Entrance {
    serving: Arc<Serving>,
    host: Arc<Host>,
    driver: Arc<Driver>,
}

/// What has to be polled for a request.
pub struct Begun {
    /// Its visit, which goes on as far as it is polled.
    pub flight: Flight,
    /// The life of an instance that was made for it and may outlive it.
    pub life: Option<Flight>,
}

impl Serving {
    /// Makes instances that live as `reuse` says.
    pub fn new(program: Arc<super::Program>, host: Host, reuse: Reuse) -> Arc<Self> {
        let (warm, instances) = (Warm::new(reuse.requests, reuse.idle), Instances::new(reuse));
        Arc::new(Self { program, host, warm, instances })
    }

    /// For the requests of one connection.
    pub fn entrance(self: &Arc<Self>, ticker: &Ticker) -> Arc<Entrance> {
        let driver = ticker.driver(Arc::clone(&self.host.cpu), self.host.environment.user.clone());
        Arc::new(Entrance { serving: Arc::clone(self), host: self.host.of_connection(), driver })
    }

    /// As [`Program::shares_instances`](super::Program::shares_instances).
    pub fn shares_instances(&self) -> bool {
        self.program.shares_instances()
    }

    /// Lets go of instances that wait for nothing.
    pub fn cool_down(&self) {
        self.warm.cool_down();
        self.instances.cool_down();
    }

    /// From here on no instance waits for another request.
    pub fn close(&self) {
        self.instances.close();
    }
}

impl Entrance {
    /// The visit of one request.
    pub fn begin<B>(self: &Arc<Self>, number: u64, request: http::Request<B>) -> Begun
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<wasmtime_wasi_http::Error>,
    {
        let exchange = Exchange::new();
        let super::Program::Server(server) = &*self.serving.program else {
            exchange.stop(Failure::Host("the program is no server".into()));
            return Begun { flight: self.fly(exchange, async {}), life: None };
        };
        match server.ready() {
            Ready::Proxy(_) => {
                let (entrance, answers) = (Arc::clone(self), Answers(Arc::clone(&exchange)));
                // The request is in this future once; every `async fn` it were handed through would hold it twice more.
                let visit = async move {
                    let exchange = &answers.0;
                    let mut instance = match entrance.instance(number).await {
                        Ok(instance) => instance,
                        Err(error) => return exchange.settle(&Err(error)),
                    };
                    let outcome = match instance.let_in(request, exchange) {
                        Ok(visited) => instance.handle(visited).await,
                        Err(error) => Err(error),
                    };
                    // Looks at the body while the store lives.
                    exchange.settle(&outcome);
                    if outcome.is_ok() {
                        entrance.serving.warm.keep(instance);
                    }
                };
                Begun { flight: self.fly(exchange, visit), life: None }
            }
            Ready::Service(pre) => {
                let request = request.map(|body| body.map_err(Into::into).boxed_unsync());
                let visit = Visit { request, exchange: Arc::clone(&exchange) };
                match self.serving.instances.ask(pre, &self.host, number, visit) {
                    Ok((seat, life)) => Begun {
                        flight: self.fly(exchange, seat.wait()),
                        life: life.map(|life| self.fly(Exchange::new(), life)),
                    },
                    Err(failure) => {
                        exchange.stop(failure);
                        Begun { flight: self.fly(exchange, async {}), life: None }
                    }
                }
            }
        }
    }

    fn fly(&self, exchange: Arc<Exchange>, guest: impl Future<Output = ()> + Send + 'static) -> Flight {
        let mut guest = self.driver.drive_next(guest);
        guest.time_by(Clock::Wall);
        Flight { exchange, guest }
    }

    /// An instance for the request of this number: one that waits for its next, or a new one.
    async fn instance(&self, number: u64) -> wasmtime::Result<Instance> {
        // Looked at again: a copy of it for each request would cost more.
        let super::Program::Server(server) = &*self.serving.program else {
            return Err(wasmtime::Error::msg("the program is no server"));
        };
        let Ready::Proxy(pre) = server.ready() else {
            return Err(wasmtime::Error::msg("the program serves another version of wasi:http"));
        };
        if let Some(mut instance) = self.serving.warm.take(pre.engine()) {
            instance.store.data_mut().turn_to(number);
            return Ok(instance);
        }
        let mut store = visitor::store(pre.engine(), server.kind(), &self.host, Some(number));
        let proxy = pre.instantiate_async(&mut store).await?;
        Ok(Instance::new(store, proxy))
    }
}

/// Whoever waits for a guest that is dropped on its way hears of it.
struct Answers(Arc<Exchange>);

impl Drop for Answers {
    fn drop(&mut self) {
        self.0.stop(Failure::Stopped);
    }
}

impl Instance {
    /// Gives the guest its request, and somewhere to put its answer.
    fn let_in<B>(&mut self, request: http::Request<B>, exchange: &Arc<Exchange>) -> wasmtime::Result<Visited>
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
        Ok((request, out))
    }

    /// Calls the guest with them. The call's own future, of 1.4 KiB: an `async fn` would copy it once more.
    fn handle(&mut self, (request, out): Visited) -> impl Future<Output = wasmtime::Result<()>> {
        self.proxy.wasi_http_incoming_handler().call_handle(&mut self.store, request, out)
    }
}

/// What a guest of WASI 0.2 is called with.
type Visited = (Resource<HostIncomingRequest>, Resource<HostResponseOutparam>);

/// A request on its visit, or the life of an instance (whose exchange is nobody's).
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

    /// It has landed: its exchange, and its memory for the next one.
    pub fn land(self) -> Arc<Exchange> {
        self.guest.retire();
        self.exchange
    }

    /// Goes on with the guest.
    pub fn step(&mut self, cx: &mut Context<'_>) -> Step {
        visitor::begin_turn();
        match Pin::new(&mut self.guest).poll(cx) {
            Poll::Ready(()) => Step::Landed,
            Poll::Pending if visitor::is_spinning() => {
                self.guest.time_by(Clock::Cpu);
                Step::Spinning
            }
            Poll::Pending => Step::Waiting,
        }
    }
}
