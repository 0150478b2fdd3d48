//! One connection: which protocol it speaks, how long it may keep us waiting, how it ends in a drain.
//!
//! ```text
//! accepted ─▶ first bytes ─▶ HTTP/2 (its preface) or HTTP/1.1 ─▶ requests ─▶ closed by the client,
//!                                                                            by a timeout, or by the drain
//! ```
//! One timer serves a connection. It is set when it fires, not when something happens: reads and writes only note the time,
//! and a request costs no timer of its own.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioTimer;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::bell::Phase;
use super::progress::{Expired, Io, Progress};
use super::request::respond;
use super::server::Server;
use super::streams::Streams;
use crate::stdio::watched;

/// What a client that speaks HTTP/2 without negotiation says first (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Streams of one HTTP/2 connection at once; the server's own limit of requests stands above it.
const MAX_STREAMS: u32 = 250;

/// Serves a connection to its end.
pub async fn serve(server: Arc<Server>, stream: TcpStream, peer: SocketAddr) {
    // Small answers leave at once.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "TCP_NODELAY");
    }
    let progress = Progress::new(Arc::clone(&server), peer);
    let speaks_h2 = tokio::select! {
        speaks = speaks_http2(&stream) => speaks,
        () = tokio::time::sleep(server.settings().header_timeout) => return,
        () = server.silence() => return,
    };
    let io = Io::new(stream, Arc::clone(&progress));
    let result = match speaks_h2 {
        Ok(true) => serve_http2(io, &progress).await,
        Ok(false) => serve_http1(io, &progress).await,
        Err(error) => return tracing::debug!(%peer, %error, "a connection failed before its first request"),
    };
    if let Err(error) = result {
        tracing::debug!(container = %server.name(), %peer, %error, "a connection ended");
    }
}

/// Looks at the first bytes and leaves them where they are. Three tell: no method of HTTP/1.1 begins like the preface.
async fn speaks_http2(stream: &TcpStream) -> io::Result<bool> {
    loop {
        let ready = stream.ready(Interest::READABLE).await?;
        match stream.try_io(Interest::READABLE, || look(stream)) {
            // The next byte is an event of its own. The end is one that stays, and nothing comes after it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if ready.is_read_closed() {
                    return Ok(false);
                }
            }
            speaks => return speaks,
        }
    }
}

/// `WouldBlock` as long as there is not enough to tell.
fn look(stream: &TcpStream) -> io::Result<bool> {
    let mut first = [0; 3];
    let (count, _) = rustix::net::recv(stream, &mut first, RecvFlags::PEEK)?;
    match &first[..count] {
        [] => Ok(false),
        head if count < first.len() && PREFACE.starts_with(head) => Err(io::ErrorKind::WouldBlock.into()),
        head => Ok(PREFACE.starts_with(head)),
    }
}

async fn serve_http1(io: Io, progress: &Arc<Progress>) -> Result<(), hyper::Error> {
    let settings = progress.server().settings();
    let mut builder = http1::Builder::new();
    // Not pipeline_flush: with it hyper buffers a response without bound, however slow its reader is.
    // The buffer's size alone lets a head pass that is larger but came at once.
    builder.max_buf_size(settings.max_header_size).max_header_size(settings.max_header_size).half_close(false);
    if settings.max_headers != DEFAULT_MAX_HEADERS {
        builder.max_headers(settings.max_headers);
    }
    let service = service_fn(|request: hyper::Request<Incoming>| respond(Arc::clone(progress), request));
    let mut connection = pin!(builder.serve_connection(io, service));
    drive(progress, connection.as_mut(), |connection| connection.graceful_shutdown()).await
}

/// hyper has room for so many on its stack; another number, even a smaller one, costs every request an allocation.
const DEFAULT_MAX_HEADERS: usize = 100;

async fn serve_http2(io: Io, progress: &Arc<Progress>) -> Result<(), hyper::Error> {
    let (server, settings) = (progress.server(), progress.server().settings());
    let mut builder = http2::Builder::new(Streams { tasks: server.tasks().clone(), patience: settings.idle_timeout });
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(u32::try_from(settings.max_header_size).unwrap_or(u32::MAX))
        // Finds a client that vanished without a word; later than it would be idle, as the reply to a ping is progress.
        .keep_alive_interval(Some(settings.idle_timeout.saturating_mul(2)))
        .keep_alive_timeout(settings.idle_timeout);
    let service = {
        let progress = Arc::clone(progress);
        service_fn(move |request| respond(Arc::clone(&progress), request))
    };
    let mut connection = pin!(builder.serve_connection(io, service));
    // HTTP/2 can say goodbye without losing what is on its way (GOAWAY), so it does so at once.
    progress.says_goodbye_itself();
    drive(progress, connection.as_mut(), |connection| connection.graceful_shutdown()).await
}

/// Polls a connection until it ends, runs out of patience, or is told to.
///
/// By hand, because this is on the way of every request: besides the connection itself, a poll looks at two numbers and at
/// the state of a timer. The bell wakes the task when the number changes.
async fn drive<C: Future<Output = Result<(), hyper::Error>>>(
    progress: &Progress,
    mut connection: Pin<&mut C>,
    say_goodbye: impl Fn(Pin<&mut C>),
) -> Result<(), hyper::Error> {
    let server = progress.server();
    let _heard = server.bell().listen(poll_fn(|cx| Poll::Ready(cx.waker().clone())).await);
    let (mut told, mut registered) = (false, false);
    let mut timer = pin!(tokio::time::sleep_until(progress.look(told)));
    let mut next = |connection: &mut Pin<&mut C>, cx: &mut Context<'_>| {
        loop {
            if let Poll::Ready(result) = connection.as_mut().poll(cx) {
                return Poll::Ready(Next::Ended(result));
            }
            match server.bell().phase() {
                Phase::Serving => {}
                Phase::Draining if told => {}
                Phase::Draining => {
                    told = true;
                    if progress.may_close_at_once() {
                        say_goodbye(connection.as_mut());
                    }
                    timer.as_mut().reset(progress.look(told));
                    registered = false;
                    continue;
                }
                Phase::Cut => return Poll::Ready(Next::Ended(Ok(()))),
            }
            // A head that has begun has less time than the rest before it had.
            if progress.has_begun_a_head() && progress.look(told) < timer.deadline() {
                timer.as_mut().reset(progress.look(told));
                registered = false;
            }
            // Once registered, a timer that has not fired need not be asked.
            if registered && !timer.is_elapsed() {
                return Poll::Pending;
            }
            registered = true;
            ready!(timer.as_mut().poll(cx));
            let expired = progress.expired(told);
            timer.as_mut().reset(progress.next_look(told));
            registered = false;
            match expired {
                Expired::No => {}
                Expired::Farewell => return Poll::Ready(Next::Farewell),
                Expired::Dead(why) => {
                    tracing::debug!(container = %server.name(), peer = %progress.peer(), why, "a connection is closed");
                    return Poll::Ready(Next::Ended(Ok(())));
                }
            }
        }
    };
    loop {
        if let Next::Ended(result) = poll_fn(|cx| next(&mut connection, cx)).await {
            return result;
        }
        // In a drain the connection has had its farewell and no request came, or one is in the socket by now.
        a_turn_of_the_reactor().await;
        if let Poll::Ready(result) = poll_fn(|cx| Poll::Ready(connection.as_mut().poll(cx))).await {
            return result;
        }
        if progress.is_idle() {
            say_goodbye(connection.as_mut());
        }
    }
}

/// Waits until all that is in a socket by now shows: an event that is there from the start comes after those that wait, and
/// one thread at a time hands them out.
async fn a_turn_of_the_reactor() {
    let event = eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(io::Error::from);
    match event.and_then(|event| Ok(watched(event, Interest::READABLE)?)) {
        Ok(event) => drop(event.readable().await),
        // No descriptors left: as good as it gets.
        Err(_) => tokio::task::yield_now().await,
    }
}

/// What became of a connection.
enum Next {
    Ended(Result<(), hyper::Error>),
    /// It had its farewell.
    Farewell,
}
