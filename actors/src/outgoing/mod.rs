//! The outgoing requests of one container.
//!
//! ```text
//!  guest ─▶ Client::send ─▶ OutgoingPolicy ─▶ pool ─┬─ idle connection
//!                                                   └─ Connector (name, socket in the pod's network, TLS)
//!        ◀─ ResponseBody ◀── timeouts ◀── connection task, owned by the Client
//! ```
//! Each container has a [`Client`] of its own: connections, trust and names are never shared between containers. What it
//! started ends with its last clone: connections are cut, requests and bodies in flight fail. A response is handed on as it
//! comes: no redirect is followed, nothing is decoded, nothing is cached.

mod body;
mod connect;
mod exchange;
mod failure;
mod policy;
mod trust;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::uri::Scheme;
use http::{Method, Request, Uri};
use hyper_util::client::legacy;
use hyper_util::rt::TokioTimer;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::ContainerId;
use crate::names::Names;
use crate::pod::Network;
use body::Upload;
use connect::Connector;
use exchange::exchange;

pub use body::RequestBody;
pub use exchange::{Exchange, SendError};
pub use failure::{BoxError, Failure};
pub use policy::OutgoingPolicy;

/// How long name look-up, TCP and TLS may take together, where the guest does not say.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the response may be awaited after the last piece of the request, where the guest does not say.
pub const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the next piece of a response may be awaited, where the guest does not say.
pub const BETWEEN_BYTES_TIMEOUT: Duration = Duration::from_secs(60);

/// Idle connections that are kept for each host, and for how long.
const MAX_IDLE: usize = 8;
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest head of a response, in bytes; it is also what is buffered of a connection in each direction.
const MAX_HEAD: usize = 64 << 10;
/// What an HTTP/2 server may send ahead of a guest that does not read: for one response, for all of a connection.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// A silent HTTP/2 connection with requests on it is asked for a sign of life, and left after as long again without one:
/// else all later requests to that host would share its fate.
const PING: Duration = Duration::from_secs(10);

type Pool = legacy::Client<Connector, Upload>;

/// What the outgoing requests of one container depend on.
#[derive(Debug, Clone)]
pub struct ClientSettings {
    /// Whose they are, for the log.
    pub container: ContainerId,
    /// Where they may go.
    pub policy: OutgoingPolicy,
    /// Where its sockets are made.
    pub network: Network,
    /// Where its names are looked up.
    pub names: Arc<Names>,
    /// Its root filesystem on the host, for the certificates of its image.
    pub rootfs: Option<PathBuf>,
    /// `SSL_CERT_FILE` of its environment.
    pub certificates: Option<PathBuf>,
}

/// How long to wait for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    pub connect: Duration,
    pub first_byte: Duration,
    pub between_bytes: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: CONNECT_TIMEOUT, first_byte: FIRST_BYTE_TIMEOUT, between_bytes: BETWEEN_BYTES_TIMEOUT }
    }
}

/// Sends the requests of one container. Clones share everything; the last one to go ends it all.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    container: ContainerId,
    policy: OutgoingPolicy,
    pool: Pool,
    spawner: Spawner,
}

impl Client {
    /// A client without connections. Cheap: reads and starts nothing.
    pub fn new(settings: &ClientSettings) -> Self {
        let spawner = Spawner::default();
        let pool = legacy::Client::builder(spawner.clone())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(MAX_IDLE)
            .http1_max_buf_size(MAX_HEAD)
            .timer(TokioTimer::new())
            .http2_max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
            .http2_initial_stream_window_size(STREAM_WINDOW)
            .http2_initial_connection_window_size(CONNECTION_WINDOW)
            .http2_max_send_buf_size(MAX_HEAD)
            .http2_keep_alive_interval(PING)
            .http2_keep_alive_timeout(PING)
            .build(Connector::new(settings));
        let (container, policy) = (settings.container.clone(), settings.policy.clone());
        Self(Arc::new(Inner { container, policy, pool, spawner }))
    }

    /// Sends `request`, whose URI names scheme and host, and waits for the head of the response. The future does not keep
    /// the client: it fails with `Terminated` once the last clone is gone. Needs a tokio runtime when polled.
    pub fn send(
        &self,
        request: Request<RequestBody>,
        timeouts: Timeouts,
    ) -> impl Future<Output = Result<Exchange, SendError>> + Send + use<> {
        let admitted = self.admit(&request);
        let (pool, ended) = (self.0.pool.clone(), self.0.spawner.ended.clone());
        let container = self.0.container.clone();
        async move {
            admitted?;
            let authority = request.uri().authority().map(ToString::to_string).unwrap_or_default();
            let sent = ended.run_until_cancelled(exchange(pool, request, timeouts)).await;
            let sent = sent.unwrap_or_else(|| Err(Failure::Terminated.into()));
            sent.inspect_err(|error| match error {
                SendError::Failed(Failure::Configuration(why)) => {
                    tracing::warn!(%container, authority, why, "an outgoing request is not possible");
                }
                error => tracing::debug!(%container, authority, %error, "an outgoing request failed"),
            })
        }
    }

    /// Ends everything that requests of this container have started, and waits until it has.
    pub async fn close(&self) {
        self.0.spawner.ended.cancel();
        self.0.spawner.tasks.close();
        self.0.spawner.tasks.wait().await;
    }

    fn admit(&self, request: &Request<RequestBody>) -> Result<(), Failure> {
        let (host, port) = endpoint(request.uri())?;
        if request.method() == Method::CONNECT {
            return Err(Failure::InvalidMethod);
        }
        if !self.0.policy.allows(host, port) {
            tracing::info!(container = %self.0.container, host, port, "an outgoing request is not allowed");
            return Err(Failure::Denied);
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.spawner.ended.cancel();
    }
}

/// Where a request to `uri` goes.
fn endpoint(uri: &Uri) -> Result<(&str, u16), Failure> {
    let default = match uri.scheme() {
        Some(scheme) if *scheme == Scheme::HTTP => 80,
        Some(scheme) if *scheme == Scheme::HTTPS => 443,
        Some(_) | None => return Err(Failure::InvalidUri),
    };
    let authority = uri.authority().ok_or(Failure::InvalidUri)?;
    // Names and passwords before an @ have no place in a request; and nobody shall be misled about the host.
    let port = authority.as_str().strip_prefix(authority.host()).ok_or(Failure::InvalidUri)?;
    let port = if matches!(port, "" | ":") { Some(default) } else { authority.port_u16() };
    match port {
        Some(port) if !authority.host().is_empty() => Ok((authority.host(), port)),
        Some(_) | None => Err(Failure::InvalidUri),
    }
}

/// Starts what the pool wants started: connections and the eviction of idle ones.
#[derive(Clone, Default)]
struct Spawner {
    tasks: TaskTracker,
    ended: CancellationToken,
}

impl<F> hyper::rt::Executor<F> for Spawner
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        let ended = self.ended.clone();
        self.tasks.spawn(async move {
            // A connection that is cut has told its request: nothing to report.
            let _done = ended.run_until_cancelled(task).await;
        });
    }
}
