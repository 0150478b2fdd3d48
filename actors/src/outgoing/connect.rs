//! One connection: name, socket, TCP, TLS, all before one deadline.
//!
//! ```text
//!  pool ─ Uri ─▶ Connector ─▶ permit ─▶ Names ─▶ Network::socket ─▶ connect ─▶ (https) TLS ─▶ stream
//! ```
//! The addresses of a name are tried in order, each with an equal part of the time that is left, so that a dead first one
//! does not use it up. Only the pool of `outgoing` calls this; its errors are [`Failure`]s from the start.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use http::Uri;
use http::uri::Scheme;
use hyper_rustls::{DefaultServerNameResolver, HttpsConnector, MaybeHttpsStream};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};
use tower_service::Service;

use super::failure::{BoxError, Failure};
use super::trust::Trust;
use super::{CONNECT_TIMEOUT, ClientSettings, endpoint};
use crate::names::Names;
use crate::pod::Network;

/// Connections of one container at once, idle ones included: descriptors are the whole process's.
const MAX_CONNECTIONS: usize = 512;

tokio::task_local! {
    /// When the connection for the request in this task must stand: the pool hands nothing but a URI through.
    pub(super) static DEADLINE: Instant;
}

type Making<T> = Pin<Box<dyn Future<Output = Result<T, Failure>> + Send>>;

/// Makes the connections of one container.
#[derive(Clone)]
pub(super) struct Connector(Arc<Parts>);

struct Parts {
    network: Network,
    names: Arc<Names>,
    trust: Trust,
    permits: Arc<Semaphore>,
}

impl Connector {
    pub(super) fn new(settings: &ClientSettings) -> Self {
        let ClientSettings { network, names, rootfs, certificates, .. } = settings.clone();
        Self(Arc::new(Parts {
            names,
            trust: Trust::new(rootfs, certificates),
            permits: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            network,
        }))
    }
}

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<TokioIo<Stream>>;
    type Error = Failure;
    type Future = Making<Self::Response>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        // Asked here and not below: the pool may finish a connection in a task of its own.
        let deadline = DEADLINE.try_with(|deadline| *deadline).unwrap_or_else(|_| Instant::now() + CONNECT_TIMEOUT);
        let tcp = Tcp { parts: Arc::clone(&self.0), deadline };
        if uri.scheme() == Some(&Scheme::HTTPS) {
            Box::pin(async move { timeout_at(deadline, tls(tcp, uri)).await.unwrap_or(Err(Failure::ConnectTimeout)) })
        } else {
            Box::pin(async move { Ok(MaybeHttpsStream::Http(tcp.connect(&uri).await?)) })
        }
    }
}

async fn tls(tcp: Tcp, uri: Uri) -> Result<MaybeHttpsStream<TokioIo<Stream>>, Failure> {
    let config = tcp.parts.trust.config().await?;
    let mut tls = HttpsConnector::new(tcp, config, true, Arc::new(DefaultServerNameResolver::default()));
    tls.call(uri).await.map_err(|error: BoxError| match error.downcast::<Failure>() {
        Ok(failure) => *failure,
        Err(error) => match error.downcast_ref::<io::Error>() {
            Some(error) => Failure::of_stream(error),
            // The one error left: the host is neither a name nor an address.
            None => Failure::InvalidUri,
        },
    })
}

/// The part below TLS, for one connection.
struct Tcp {
    parts: Arc<Parts>,
    deadline: Instant,
}

impl Service<Uri> for Tcp {
    type Response = TokioIo<Stream>;
    type Error = Failure;
    type Future = Making<Self::Response>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let tcp = Self { parts: Arc::clone(&self.parts), deadline: self.deadline };
        Box::pin(async move { tcp.connect(&uri).await })
    }
}

impl Tcp {
    async fn connect(&self, uri: &Uri) -> Result<TokioIo<Stream>, Failure> {
        let (host, port) = endpoint(uri)?;
        let permit = timeout_at(self.deadline, Arc::clone(&self.parts.permits).acquire_owned()).await;
        let permit = permit.map_err(|_| Failure::TooManyConnections)?;
        let permit = permit.map_err(|e| Failure::Internal(e.to_string()))?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let addresses = timeout_at(self.deadline, self.parts.names.lookup(bare)).await;
        let addresses = addresses.map_err(|_| Failure::DnsTimeout)??;
        let mut failure = Failure::Dns(format!("{host}: the name has no address"));
        for (address, rest) in addresses.iter().zip((1..=addresses.len()).rev()) {
            let addr = SocketAddr::new(*address, port);
            let share =
                self.deadline.saturating_duration_since(Instant::now()) / u32::try_from(rest).unwrap_or(u32::MAX);
            match timeout(share, self.dial(addr)).await {
                Ok(Ok(tcp)) => return Ok(TokioIo::new(Stream { tcp, proven: Proven::default(), _permit: permit })),
                Ok(Err(error)) => failure = Failure::of_connect(&error),
                Err(_) => failure = Failure::ConnectTimeout,
            }
            tracing::debug!(%addr, %failure, "could not connect");
        }
        Err(failure)
    }

    async fn dial(&self, addr: SocketAddr) -> io::Result<TcpStream> {
        self.parts.network.socket(&addr)?.connect(addr).await
    }
}

/// Whether a connection has brought a response yet. Travels with it through the pool.
#[derive(Clone, Default)]
pub(super) struct Proven(Arc<AtomicBool>);

impl Proven {
    pub(super) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A TCP connection that counts among the container's.
pub(super) struct Stream {
    tcp: TcpStream,
    proven: Proven,
    _permit: OwnedSemaphorePermit,
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new().extra(self.proven.clone())
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ContainerId;
    use crate::names::NameFiles;

    #[tokio::test]
    async fn a_container_has_no_more_connections_than_its_share() {
        let mut connector = Connector::new(&ClientSettings {
            container: ContainerId::new("test", "connect"),
            policy: Default::default(),
            network: Network::host(),
            names: Arc::new(Names::new(NameFiles { rootfs: None, hosts: None, resolv_conf: None }, Network::host())),
            rootfs: None,
            certificates: None,
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri: Uri = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        let permits = Arc::clone(&connector.0.permits);
        let others = permits.acquire_many(u32::try_from(MAX_CONNECTIONS).unwrap() - 1).await.unwrap();
        let last = connector.call(uri.clone()).await.ok().unwrap();

        let deadline = Instant::now() + Duration::from_millis(100);
        let refused = DEADLINE.scope(deadline, async { connector.call(uri.clone()).await.err() }).await;
        assert_eq!(refused, Some(Failure::TooManyConnections));
        // One that ends makes room for one that waits.
        let waiting = connector.call(uri);
        drop(last);
        assert!(waiting.await.is_ok());
        drop(others);
    }
}
