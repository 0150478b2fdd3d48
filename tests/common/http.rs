//! HTTP as a client speaks it: connections of hyper, bare sockets, and curl.
//!
//! hyper for what a well-behaved client sees, a bare socket for what no library would send or tell apart (a connection
//! that ends before its answer does), curl because it is what people use. All of them have deadlines.

use std::convert::Infallible;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::pin::Pin;
use std::process::Command;
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::client::conn::{http1, http2};
use hyper::http::{HeaderMap, Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::SOON;
use super::job::{self, Done};

/// The body of a request.
pub type Outgoing = UnsyncBoxBody<Bytes, Infallible>;

/// Runs the clients of a case, on this thread: the server's cores are the same ones.
pub fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

/// Bounds a wait and gives its failure a name.
pub async fn soon<T, E: Into<anyhow::Error>>(what: &str, work: impl Future<Output = Result<T, E>>) -> Result<T> {
    within(SOON, what, work).await
}

pub async fn within<T, E: Into<anyhow::Error>>(
    limit: Duration,
    what: &str,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T> {
    match tokio::time::timeout(limit, work).await {
        Ok(done) => done.map_err(|error| error.into().context(what.to_owned())),
        Err(_) => bail!("waited {limit:?} for {what}: it did not come"),
    }
}

/// A complete answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub trailers: Option<HeaderMap>,
}

impl Answer {
    /// Everything up to the end, which has to be a clean one.
    pub async fn of(response: Response<Incoming>) -> Result<Self> {
        let (head, body) = response.into_parts();
        let body = soon("the body", body.collect()).await?;
        let trailers = body.trailers().cloned();
        Ok(Self { status: head.status, headers: head.headers, body: body.to_bytes(), trailers })
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Fails unless it is this one.
    pub fn expect(&self, status: u16, text: &str) -> Result<()> {
        if self.status.as_u16() != status || self.text() != text {
            bail!("expected {status} {text:?}, got {self:?}");
        }
        Ok(())
    }
}

/// One connection, of either protocol.
pub struct Connection {
    addr: SocketAddr,
    sender: Sender,
    /// Ends with the connection.
    pub driver: JoinHandle<hyper::Result<()>>,
}

enum Sender {
    One(http1::SendRequest<Outgoing>),
    Two(http2::SendRequest<Outgoing>),
}

/// HTTP/1.1 or HTTP/2 with prior knowledge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    One,
    Two,
}

pub const BOTH: [Protocol; 2] = [Protocol::One, Protocol::Two];

impl Connection {
    pub async fn open(addr: SocketAddr, protocol: Protocol) -> Result<Self> {
        let stream = soon("a connection", TcpStream::connect(addr)).await?;
        stream.set_nodelay(true)?;
        let io = TokioIo::new(stream);
        Ok(match protocol {
            Protocol::One => {
                let (sender, driver) = http1::handshake(io).await?;
                Self { addr, sender: Sender::One(sender), driver: tokio::spawn(driver) }
            }
            Protocol::Two => {
                let (sender, driver) = http2::handshake(TokioExecutor::new(), io).await?;
                Self { addr, sender: Sender::Two(sender), driver: tokio::spawn(driver) }
            }
        })
    }

    /// HTTP/2 whose answers come in pieces of at most `window` bytes each time the client has read.
    pub async fn open_narrow(addr: SocketAddr, window: u32) -> Result<Self> {
        let stream = soon("a connection", TcpStream::connect(addr)).await?;
        let mut builder = http2::Builder::new(TokioExecutor::new());
        let (sender, driver) = builder.initial_stream_window_size(window).handshake(TokioIo::new(stream)).await?;
        Ok(Self { addr, sender: Sender::Two(sender), driver: tokio::spawn(driver) })
    }

    /// The head of the answer.
    pub async fn send(&mut self, request: Request<Outgoing>) -> Result<Response<Incoming>> {
        self.send_within(SOON, request).await
    }

    pub async fn send_within(&mut self, limit: Duration, request: Request<Outgoing>) -> Result<Response<Incoming>> {
        let what = format!("an answer to {} {}", request.method(), request.uri());
        match &mut self.sender {
            Sender::One(sender) => {
                within(limit, "the connection to be ready", sender.ready()).await?;
                within(limit, &what, sender.send_request(request)).await
            }
            Sender::Two(sender) => {
                within(limit, "the connection to be ready", sender.ready()).await?;
                within(limit, &what, sender.send_request(request)).await
            }
        }
    }

    pub async fn fetch(&mut self, request: Request<Outgoing>) -> Result<Answer> {
        Answer::of(self.send(request).await?).await
    }

    /// Sends a request now; its whole answer comes when the future is awaited, and other requests may be sent meanwhile
    /// (HTTP/2).
    pub fn begin(
        &mut self,
        request: Request<Outgoing>,
    ) -> Result<impl Future<Output = Result<Answer>> + Send + 'static> {
        let what = format!("an answer to {} {}", request.method(), request.uri());
        let Sender::Two(sender) = &mut self.sender else { bail!("HTTP/1.1 sends one at a time") };
        let answer = sender.send_request(request);
        Ok(async move { Answer::of(soon(&what, answer).await?).await })
    }

    /// GET.
    pub async fn get(&mut self, path: &str) -> Result<Answer> {
        let request = self.request(Method::GET, path, empty())?;
        self.fetch(request).await
    }

    /// POST with a body that is all here.
    pub async fn post(&mut self, path: &str, body: impl Into<Bytes>) -> Result<Answer> {
        let request = self.request(Method::POST, path, full(body))?;
        self.fetch(request).await
    }

    /// A request as each protocol wants it: HTTP/2 has the authority in its target.
    pub fn request(&self, method: Method, path: &str, body: Outgoing) -> Result<Request<Outgoing>> {
        let builder = Request::builder().method(method);
        let builder = match &self.sender {
            Sender::One(_) => builder.uri(path).header("host", self.addr.to_string()),
            Sender::Two(_) => builder.uri(format!("http://{}{path}", self.addr)),
        };
        builder.body(body).context("a request")
    }
}

/// One request on a connection of its own.
pub async fn get(addr: SocketAddr, protocol: Protocol, path: &str) -> Result<Answer> {
    Connection::open(addr, protocol).await?.get(path).await
}

pub fn empty() -> Outgoing {
    full(Bytes::new())
}

pub fn full(body: impl Into<Bytes>) -> Outgoing {
    Full::new(body.into()).boxed_unsync()
}

/// A body that is sent frame by frame. Dropping the sender ends it.
pub fn fed() -> (mpsc::Sender<Frame<Bytes>>, Outgoing) {
    let (sender, receiver) = mpsc::channel(1);
    (sender, Fed(receiver).boxed_unsync())
}

struct Fed(mpsc::Receiver<Frame<Bytes>>);

impl Body for Fed {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|frame| frame.map(Ok))
    }
}

/// A bare connection, whose reads and writes do not wait for ever.
pub fn socket(addr: SocketAddr) -> Result<std::net::TcpStream> {
    let stream = std::net::TcpStream::connect_timeout(&addr, SOON).with_context(|| format!("connect to {addr}"))?;
    stream.set_read_timeout(Some(SOON))?;
    stream.set_write_timeout(Some(SOON))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// How a bare connection ended.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub enum End {
    /// In order (FIN).
    Closed,
    /// RST.
    Reset,
    /// Not at all, in the time given.
    Open,
}

/// What comes until the end of the connection, or of the time.
pub fn read_all(stream: &mut std::net::TcpStream, limit: Duration) -> Result<(Vec<u8>, End)> {
    let deadline = Instant::now() + limit;
    let (mut bytes, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok((bytes, End::Open));
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer) {
            Ok(0) => return Ok((bytes, End::Closed)),
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            Err(error) => match error.kind() {
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => return Ok((bytes, End::Open)),
                std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe => return Ok((bytes, End::Reset)),
                std::io::ErrorKind::Interrupted => {}
                _ => return Err(anyhow!(error).context("a read")),
            },
        }
    }
}

/// Sends bytes on a connection of their own, and tells what came back.
pub fn exchange(addr: SocketAddr, bytes: &[u8], limit: Duration) -> Result<(Vec<u8>, End)> {
    let mut stream = socket(addr)?;
    // A server that refuses early may close before it has everything.
    let _ = stream.write_all(bytes);
    read_all(&mut stream, limit)
}

/// curl, quiet, with these words.
pub fn curl(words: &[&str]) -> Result<Done> {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--max-time", "20", "--noproxy", "*"]).args(words);
    job::run(command, SOON)
}
