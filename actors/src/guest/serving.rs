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
use wasmtime_wasi_http::WasiHttpView;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme;

use super::epoch::{Clock, Driven, Ticker};
use super::exchange::{Exchange, Failure};
use super::proxy::Ready;
use super::shared::{Instances, Reuse, Visit};
use super::visitor::{self, Host};
use super::warm::{Instance, Warm};

/// A server and the container it serves for.
pub struct Serving {
    program: Arc<super::Program>,
    host: Arc<Host>,
    /// Of a guest of WASI 0.2.
    warm: Warm,
    /// Of one of WASI 0.3.
    instances: Arc<Instances>,
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
        Arc::new(Self { program, host: Arc::new(host), warm, instances })
    }

    /// The visit of one request.
    pub fn begin<B>(self: &Arc<Self>, ticker: &Ticker, number: u64, request: http::Request<B>) -> Begun
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<wasmtime_wasi_http::Error>,
    {
        let exchange = Exchange::new();
        let super::Program::Server(server) = &*self.program else {
            exchange.stop(Failure::Host("the program is no server".into()));
            return Begun { flight: self.fly(ticker, exchange, async {}), life: None };
        };
        match server.ready() {
            Ready::Proxy(_) => {
                let (serving, answers) = (Arc::clone(self), Answers(Arc::clone(&exchange)));
                let visit = async move { serving.visit(number, request, &answers.0).await };
                Begun { flight: self.fly(ticker, exchange, visit), life: None }
            }
            Ready::Service(pre) => {
                let request = request.map(|body| body.map_err(Into::into).boxed_unsync());
                let visit = Visit { request, exchange: Arc::clone(&exchange) };
                match self.instances.ask(pre, &self.host, number, visit) {
                    Ok((seat, life)) => Begun {
                        flight: self.fly(ticker, exchange, seat.wait()),
                        life: life.map(|life| self.fly(ticker, Exchange::new(), life)),
                    },
                    Err(failure) => {
                        exchange.stop(failure);
                        Begun { flight: self.fly(ticker, exchange, async {}), life: None }
                    }
                }
            }
        }
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

    fn fly(
        &self,
        ticker: &Ticker,
        exchange: Arc<Exchange>,
        guest: impl Future<Output = ()> + Send + 'static,
    ) -> Flight {
        let guest = ticker.drive(Arc::clone(&self.host.cpu), guest);
        let mut guest = guest.with_files_of(self.host.environment.user.clone());
        guest.time_by(Clock::Wall);
        Flight { exchange, guest }
    }

    async fn visit<B>(&self, number: u64, request: http::Request<B>, exchange: &Arc<Exchange>)
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<wasmtime_wasi_http::Error>,
    {
        // Looked at again: a copy of it for each request would cost more.
        let super::Program::Server(server) = &*self.program else { return };
        let Ready::Proxy(pre) = server.ready() else { return };
        let mut instance = match self.warm.take(pre.engine()) {
            Some(mut instance) => {
                instance.store.data_mut().turn_to(number);
                instance
            }
            None => {
                let mut store = visitor::store(pre.engine(), server.kind(), &self.host, Some(number));
                match pre.instantiate_async(&mut store).await {
                    Ok(proxy) => Instance::new(store, proxy),
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
