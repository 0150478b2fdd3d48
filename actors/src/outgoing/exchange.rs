//! One request and its response, with everything that is timed about them.
//!
//! ```text
//!  |── connect ──|── first_byte, anew with each piece of the request ──|── between_bytes, for each piece of the response
//!  sent          connection                                            head
//! ```
//! A kept connection may be closed by the server in the moment in which a request is sent on it. That is the pool's
//! bad luck and no failure of the guest's: a request that may be repeated (RFC 9110, 9.2.2) and has no body goes out again.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Extensions, Request, Response, StatusCode};
use http_body::Body;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::client::legacy::connect::{CaptureConnection, capture_connection};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};

use super::body::{RequestBody, ResponseBody, Turn, Upload, Watch};
use super::connect::{DEADLINE, Proven};
use super::failure::{BoxError, Failure};
use super::{MAX_HEAD, MAX_IDLE, Pool, Timeouts};

/// More than a year is for ever; clocks overflow above.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Why a request has no response, or was not sent as a whole.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The body of the request ended with this error, the guest's own.
    #[error("the body of the request: {0}")]
    RequestBody(BoxError),
}

/// A request that has its response; its body may still be on the way.
pub struct Exchange {
    pub response: Response<ResponseBody>,
    pub upload: Uploading,
}

/// The rest of a request's body. Nobody has to wait for it: the connection sends it.
pub struct Uploading {
    watch: Arc<Watch>,
    sent: oneshot::Receiver<()>,
}

impl Uploading {
    /// Waits until all of it is with the connection.
    ///
    /// # Errors
    /// When it never will be.
    pub async fn sent(self) -> Result<(), SendError> {
        self.sent.await.map_err(|_| unsent(&self.watch, Failure::Terminated))
    }
}

/// Sends a request and waits for the head of its response.
pub(super) async fn exchange(
    pool: Pool,
    mut request: Request<RequestBody>,
    timeouts: Timeouts,
) -> Result<Exchange, SendError> {
    let copy = repeatable(&request);
    // All that are kept for a host may have been closed at once.
    let mut repeats = MAX_IDLE;
    loop {
        let (parts, body) = request.into_parts();
        let (upload, watch, sent) = Upload::new(body, &parts.headers);
        let mut sending = Request::from_parts(parts, upload);
        let connection = capture_connection(&mut sending);
        let failure = match response(&pool, sending, connection.clone(), timeouts, &watch).await {
            Ok(incoming) => {
                let between_bytes = timeouts.between_bytes.min(FOREVER);
                let response = incoming.map(|incoming| ResponseBody::new(incoming, between_bytes));
                return Ok(Exchange { response, upload: Uploading { watch, sent } });
            }
            Err(failure) => failure,
        };
        match &copy {
            Some(copy) if failure == Failure::Terminated && repeats > 0 && was_kept(&connection) => {
                repeats -= 1;
                request = copy.clone().map(|()| Empty::new().map_err(|never| match never {}).boxed_unsync());
            }
            _ => return Err(unsent(&watch, failure)),
        }
    }
}

/// What to send again, if that is safe.
fn repeatable(request: &Request<RequestBody>) -> Option<Request<()>> {
    if !request.body().is_end_stream() || !request.method().is_idempotent() {
        return None;
    }
    let mut copy = Request::new(());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    Some(copy)
}

/// Whether the connection had served another request before.
fn was_kept(connection: &CaptureConnection) -> bool {
    let mut marks = Extensions::new();
    if let Some(connected) = connection.connection_metadata().as_ref() {
        connected.get_extras(&mut marks);
    }
    marks.get::<Proven>().is_some_and(Proven::get)
}

/// Why a request was not sent: the guest's own error explains any other.
fn unsent(watch: &Watch, failure: Failure) -> SendError {
    watch.take_error().map_or(SendError::Failed(failure), SendError::RequestBody)
}

async fn response(
    pool: &Pool,
    request: Request<Upload>,
    connection: CaptureConnection,
    timeouts: Timeouts,
    watch: &Watch,
) -> Result<Response<Incoming>, Failure> {
    let deadline = Instant::now() + timeouts.connect.min(FOREVER);
    let mut response = pin!(DEADLINE.scope(deadline, pool.request(request)));
    let timed_out = async {
        tokio::select! {
            () = connected(connection) => silence(watch, timeouts.first_byte.min(FOREVER)).await,
            () = sleep_until(deadline) => Failure::ConnectTimeout,
        }
    };
    let mut response = tokio::select! {
        // In this order: the connector knows better what took so long.
        biased;
        response = &mut response => response.map_err(|error| Failure::of_request(&error, MAX_HEAD))?,
        failure = timed_out => return Err(failure),
    };
    if let Some(proven) = response.extensions_mut().remove::<Proven>() {
        proven.set();
    }
    // Nobody could have asked for it: the headers that do are not the guest's to set.
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Failure::Upgraded);
    }
    // What hyper limits is a buffer that grows in steps.
    let fields = response.headers().iter().map(|(name, value)| name.as_str().len() + value.len());
    if fields.sum::<usize>() > MAX_HEAD { Err(Failure::HeadTooLarge(MAX_HEAD)) } else { Ok(response) }
}

/// Waits until the request has a connection.
async fn connected(mut connection: CaptureConnection) {
    // Nothing comes of a request that never gets one: its own error ends the wait.
    if connection.wait_for_connection_metadata().await.is_none() {
        std::future::pending::<()>().await;
    }
}

/// Waits until nothing has happened to the request for so long. A body that is being sent is no silence.
async fn silence(watch: &Watch, patience: Duration) -> Failure {
    let connected = Instant::now();
    loop {
        let end = watch.since().max(connected) + patience;
        if end <= Instant::now() {
            return match watch.turn() {
                Turn::Server => Failure::WriteTimeout,
                Turn::Guest | Turn::Response => Failure::ReadTimeout,
            };
        }
        sleep_until(end).await;
    }
}
