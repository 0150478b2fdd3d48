//! One request: refused, or served by a guest.
//!
//! ```text
//! head ─▶ sane? ─▶ permit ─▶ instance ─▶ guest, for one turn, here on the connection's worker
//!          400      503                    ├─ done:     the whole answer at once
//!          413                             ├─ waits:    a task of its own; the answer as it comes
//!                                          └─ computes: the same, in the background
//! ```
//! Invariant: what is refused here has cost no instance. A guest runs under its request's deadline from its first moment on,
//! and ends with whichever comes first: its own end, the deadline, its client's leaving, or the end of the drain.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::task::Poll;

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, HeaderValue, RETRY_AFTER, TRAILER, TRANSFER_ENCODING};
use http::response::Parts;
use http::{Method, Request, Response, StatusCode, Version};
use hyper::body::{Body, Incoming};
use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::body::{Answer, ClientBody, Leash, Verdict};
use super::progress::{Permit, Progress};
use super::server::Server;
use super::settings::HttpSettings;
use super::streams::waits_for_guest;
use super::visit::Visit;
use crate::guest::{Begun, Exchange, Failure, Flight, Step};

/// Answers a request, whatever happens.
pub async fn respond(progress: Arc<Progress>, request: Request<Incoming>) -> Result<Response<Answer>, Infallible> {
    let server = progress.server();
    let visit = Visit::begin(&progress, &request);
    let is_http1 = request.version() < Version::HTTP_2;
    let mut response = match examine(&request, server.settings()) {
        Err((status, text)) => refuse(status, text, visit),
        Ok(()) => match progress.admit() {
            Some(permit) => serve(&progress, request, permit, visit).await,
            None => overloaded(server, visit),
        },
    };
    // The last one on its connection: the client is told, so that it sends no other.
    if is_http1 && server.is_draining() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(response)
}

/// What no guest should see (RFC 9112, sections 3.2 and 6).
fn examine<B: Body>(request: &Request<B>, settings: &HttpSettings) -> Result<(), (StatusCode, &'static str)> {
    const BAD: StatusCode = StatusCode::BAD_REQUEST;
    let headers = request.headers();
    let mut hosts = headers.get_all(HOST).iter();
    let host = hosts.next();
    // In HTTP/1.1 even a target with a host needs the field; it is the target's that counts then.
    let in_target = request.version() != Version::HTTP_11 && request.uri().authority().is_some();
    let named = in_target || host.is_some_and(|host| host.to_str().is_ok());
    match () {
        () if hosts.next().is_some() => Err((BAD, "more than one Host\n")),
        () if !named => Err((BAD, "no Host\n")),
        () if headers.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH) => {
            Err((BAD, "both Transfer-Encoding and Content-Length\n"))
        }
        () if request.method() == Method::CONNECT => Err((StatusCode::METHOD_NOT_ALLOWED, "this is no proxy\n")),
        // HTTP/1.1 is refused while it is parsed; HTTP/2 counts bytes only.
        () if headers.len() > settings.max_headers => {
            Err((StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "too many header fields\n"))
        }
        () if request.body().size_hint().lower() > settings.max_body => {
            Err((StatusCode::PAYLOAD_TOO_LARGE, "the body is too large\n"))
        }
        () => Ok(()),
    }
}

async fn serve(progress: &Progress, request: Request<Incoming>, permit: Permit, visit: Visit) -> Response<Answer> {
    let (server, settings) = (progress.server(), progress.server().settings());
    let deadline = settings.request_timeout.map(|timeout| Instant::from_std(visit.begun() + timeout));
    let (head, body) = request.into_parts();
    let (body, verdict) = ClientBody::new(body, settings.max_body, settings.idle_timeout);
    let Begun { mut flight, life } = progress.entrance().begin(visit.number(), Request::from_parts(head, body));
    if let Some(life) = life {
        launch(server, life, Terms { deadline: None, leash: server.leash(), permit: None, spare: 0 }, None);
    }
    let step = poll_fn(|cx| Poll::Ready(flight.step(cx))).await;
    if let Step::Landed = step {
        let exchange = flight.land();
        exchange.keep(permit, visit.spare());
        let response = answer(server, &exchange, Leash::default(), verdict.as_deref(), visit).await;
        // First all guests that are ready on this thread, then all answers: the code of each stays in the caches.
        tokio::task::yield_now().await;
        return response;
    }
    let exchange = Arc::clone(flight.exchange());
    let leash = server.leash();
    let runtime = match step {
        Step::Spinning => Some(server.background()),
        Step::Landed | Step::Waiting => None,
    };
    let terms = Terms { deadline, leash: leash.clone(), permit: Some(permit), spare: visit.spare() };
    progress.takes_long();
    launch(server, flight, terms, runtime);
    answer(server, &exchange, Leash::new(leash.drop_guard()), verdict.as_deref(), visit).await
}

/// On which terms a guest goes on.
struct Terms {
    deadline: Option<Instant>,
    leash: CancellationToken,
    permit: Option<Permit>,
    /// Bytes of its answer that may wait when it has ended and its permit is given back.
    spare: usize,
}

/// Goes on with a guest as a task of its own: here, or in the background.
fn launch(server: &Arc<Server>, flight: Flight, terms: Terms, runtime: Option<&Handle>) {
    let (owner, moves) = (Arc::clone(server), runtime.is_none());
    // By name and not `async fn`: a task that moves starts itself again elsewhere.
    let task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(go_on(owner, flight, terms, moves));
    match runtime {
        Some(runtime) => drop(server.tasks().spawn_on(task, runtime)),
        None => drop(server.tasks().spawn(task)),
    }
}

async fn go_on(server: Arc<Server>, mut flight: Flight, terms: Terms, moves: bool) {
    enum End {
        Step(Step),
        Failed(Failure),
    }
    let step = poll_fn(|cx| match flight.step(cx) {
        Step::Waiting => Poll::Pending,
        // It is among its like already.
        Step::Spinning if !moves => Poll::Pending,
        step => Poll::Ready(step),
    });
    let end = tokio::select! {
        biased;
        () = terms.leash.cancelled() => End::Failed(Failure::Stopped),
        () = until(terms.deadline) => End::Failed(Failure::TimedOut),
        step = step => End::Step(step),
    };
    match end {
        End::Failed(failure) => flight.exchange().stop(failure),
        End::Step(Step::Spinning) => {
            launch(&server, flight, terms, Some(server.background()));
        }
        End::Step(Step::Landed | Step::Waiting) => {
            if let Some(permit) = terms.permit {
                flight.exchange().keep(permit, terms.spare);
            }
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Waits for the guest's answer.
async fn answer(
    server: &Server,
    exchange: &Arc<Exchange>,
    leash: Leash,
    verdict: Option<&Verdict>,
    mut visit: Visit,
) -> Response<Answer> {
    let head = poll_fn(|cx| {
        let head = exchange.poll_head(cx);
        if head.is_pending() {
            waits_for_guest();
        }
        head
    });
    let head = match head.await {
        Ok(head) => head,
        Err(failure) => return failed(server, &failure, verdict, visit),
    };
    if head.status.is_informational() {
        return failed(server, &Failure::Provisional(head.status), verdict, visit);
    }
    visit.answered(head.status);
    match exchange.take_whole() {
        Some((frames, place)) => {
            visit.hold(place);
            if frames.len() < 2 {
                visit.forget_target();
            }
            let mut response = with_head(head, Answer::whole(frames, visit));
            name_trailers(&mut response);
            response
        }
        None => {
            let length = head.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
            with_head(head, Answer::stream(Arc::clone(exchange), leash, length, visit))
        }
    }
}

fn with_head(head: Parts, answer: Answer) -> Response<Answer> {
    let mut response = Response::from_parts(head, answer);
    // The guest's own affair is what the answer says; how it is sent is ours.
    *response.version_mut() = Version::default();
    response
}

/// HTTP/1.1 sends only trailers that the head announced (RFC 9110, section 6.6.2).
fn name_trailers(response: &mut Response<Answer>) {
    if response.headers().contains_key(TRAILER) {
        return;
    }
    if let Some(names) = response.body().trailers() {
        response.headers_mut().insert(TRAILER, names);
        // A known length would leave no place for them.
        response.headers_mut().remove(CONTENT_LENGTH);
    }
}

/// The answer in place of the guest's, and one line that says why.
fn failed(server: &Server, failure: &Failure, verdict: Option<&Verdict>, mut visit: Visit) -> Response<Answer> {
    let number = visit.number();
    if verdict.is_some_and(Verdict::is_too_large) {
        return refuse(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large\n", visit);
    }
    if verdict.is_some_and(Verdict::is_stalled) {
        return refuse(StatusCode::REQUEST_TIMEOUT, "the body did not come\n", visit);
    }
    if verdict.is_some_and(Verdict::is_broken) {
        return refuse(StatusCode::BAD_REQUEST, "the body is broken\n", visit);
    }
    server.report(number, visit.target(), failure);
    match failure {
        Failure::TimedOut => refuse(StatusCode::GATEWAY_TIMEOUT, "the request timed out\n", visit),
        Failure::Upstream(_) => refuse(StatusCode::BAD_GATEWAY, "an upstream of the guest failed\n", visit),
        Failure::Crowded(_) => overloaded(server, visit),
        Failure::Stopped => {
            visit.cut();
            refuse(StatusCode::SERVICE_UNAVAILABLE, "the container is stopping\n", visit)
        }
        Failure::Trapped(_)
        | Failure::OutOfMemory(_)
        | Failure::Silent(_)
        | Failure::Provisional(_)
        | Failure::Refused(_)
        | Failure::Host(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "the guest failed\n", visit),
    }
}

fn overloaded(server: &Server, visit: Visit) -> Response<Answer> {
    server.overloaded();
    let mut response = refuse(StatusCode::SERVICE_UNAVAILABLE, "too many requests at once\n", visit);
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

fn refuse(status: StatusCode, text: &'static str, mut visit: Visit) -> Response<Answer> {
    visit.answered(status);
    let mut response = Response::new(Answer::text(text.to_owned(), visit));
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
