//! The servers of these tests. Each ends with its value.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::TRAILER;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::PATIENCE;
use crate::outgoing::BoxError;

pub(super) type Answer = Response<UnsyncBoxBody<Bytes, BoxError>>;

/// A running server and what it has seen.
pub(super) struct Server {
    pub(super) addr: SocketAddr,
    task: JoinHandle<()>,
    counts: watch::Receiver<Counts>,
}

#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Counts {
    /// Connections so far.
    pub(super) accepted: usize,
    /// Connections now.
    pub(super) open: usize,
}

impl Server {
    pub(super) fn accepted(&self) -> usize {
        self.counts.borrow().accepted
    }

    /// Waits until the counts are as `wanted`.
    pub(super) async fn until(&mut self, wanted: impl FnMut(&Counts) -> bool) -> Counts {
        *timeout(PATIENCE, self.counts.wait_for(wanted)).await.expect("never came about").unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Serves each connection with `serve`.
pub(super) async fn raw<S, F>(serve: S) -> Server
where
    S: Fn(TcpStream) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    serving(TcpListener::bind("127.0.0.1:0").await.unwrap(), serve)
}

pub(super) fn serving<S, F>(listener: TcpListener, serve: S) -> Server
where
    S: Fn(TcpStream) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let addr = listener.local_addr().unwrap();
    let (counting, counts) = watch::channel(Counts::default());
    let task = tokio::spawn(async move {
        let counting = Arc::new(counting);
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            counting.send_modify(|counts| {
                counts.accepted += 1;
                counts.open += 1;
            });
            let (connection, counting) = (serve(stream), Arc::clone(&counting));
            connections.spawn(async move {
                connection.await;
                counting.send_modify(|counts| counts.open -= 1);
            });
        }
    });
    Server { addr, task, counts }
}

/// Answers each request, of HTTP/1.1 and HTTP/2, with `answer`.
pub(super) async fn http<A, F>(answer: A) -> Server
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    raw(move |stream| connection(stream, answer.clone())).await
}

/// The same behind TLS, with a certificate for `localhost` (the second value, as PEM); `alpn` as the server wants it.
pub(super) async fn https<A, F>(alpn: &[&str], answer: A) -> (Server, String)
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let made = rcgen::generate_simple_self_signed(["localhost".into()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let server = raw(move |stream| {
        let (acceptor, answer) = (acceptor.clone(), answer.clone());
        async move {
            if let Ok(stream) = acceptor.accept(stream).await {
                connection(stream, answer).await;
            }
        }
    });
    (server.await, made.cert.pem())
}

pub(super) async fn connection<S, A, F>(stream: S, answer: A)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    A: Fn(Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let service = service_fn(move |request| {
        let answer = answer(request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let server = auto::Builder::new(TokioExecutor::new());
    // An error is the client's leaving, which the counts show.
    drop(server.serve_connection(TokioIo::new(stream), service).await);
}

pub(super) fn answer(text: impl Into<Bytes>) -> Answer {
    Response::new(Full::new(text.into()).map_err(|never| match never {}).boxed_unsync())
}

/// The request's body, as it comes; with its trailers if it announces some.
pub(super) async fn echo(request: Request<Incoming>) -> Answer {
    let announced = request.headers().get(TRAILER).cloned();
    let mut answer = Response::new(request.into_body().map_err(Into::into).boxed_unsync());
    answer.headers_mut().extend(announced.map(|names| (TRAILER, names)));
    answer
}

/// A listener that accepts nobody and whose queue is full: who connects now hears nothing.
pub(super) async fn full(addr: &str) -> (SocketAddr, Unaccepted) {
    use rustix::net::{AddressFamily, SocketType, bind, listen, socket};
    let listener = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&listener, &addr.parse::<SocketAddr>().unwrap()).unwrap();
    listen(&listener, 0).unwrap();
    let listener = std::net::TcpListener::from(listener);
    let addr = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = timeout(Duration::from_millis(300), TcpStream::connect(addr)).await {
        queued.push(stream.unwrap());
        assert!(queued.len() < 10, "the queue never fills");
    }
    (addr, Unaccepted { _listener: listener, _queued: queued })
}

/// Keeps it full.
pub(super) struct Unaccepted {
    _listener: std::net::TcpListener,
    _queued: Vec<TcpStream>,
}
