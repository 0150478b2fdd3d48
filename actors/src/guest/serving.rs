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
use std::time::Duration;

use bytes::Bytes;
use http_body::Body;
use wasmtime_wasi_http::WasiHttpView;
use wasmtime_wasi_http::p2::bindings::ProxyPre;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme;

use super::engine::Kind;
use super::epoch::{Clock, Driven, Ticker};
use super::exchange::{Exchange, Failure};
use super::proxy::Ready;
use super::visitor::{self, Host, Visitor};
use super::warm::{Instance, Warm};

/// A server and the container it serves for.
pub struct Serving {
    program: Arc<super::Program>,
    host: Arc<Host>,
    warm: Warm,
}

impl Serving {
    /// `reuse` requests are served by an instance, one after another, if the next comes within `idle`.
    pub fn new(program: Arc<super::Program>, host: Host, reuse: u32, idle: Duration) -> Arc<Self> {
        Arc::new(Self { program, host: Arc::new(host), warm: Warm::new(reuse, idle) })
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
            Ready::Proxy(pre) => self.call(pre, server.kind(), number, request, &answers.0).await,
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
