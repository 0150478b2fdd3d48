//! The connections to the daemon's socket, counted: who is connected may be about to create a container.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use containerd_shim_protos::ttrpc::r#async::transport::Listener;
use futures::stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

/// Before the next accept when one failed: out of descriptors, which passes.
const PAUSE: Duration = Duration::from_millis(50);

/// The number of open connections.
#[derive(Clone)]
pub struct Connections(Arc<watch::Sender<usize>>);

impl Connections {
    /// None yet.
    pub fn new() -> Self {
        Self(Arc::new(watch::channel(0).0))
    }

    /// Watches the number.
    pub fn count(&self) -> watch::Receiver<usize> {
        self.0.subscribe()
    }

    /// What `listener` accepts, for the ttrpc server, every connection counted while it is open.
    pub fn accept(&self, listener: UnixListener) -> Listener {
        Listener::new(stream::unfold((listener, self.clone()), |(listener, count)| async move {
            let accepted = listener.accept().await;
            if let Err(error) = &accepted {
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(PAUSE).await;
            }
            let connection = accepted.map(|(stream, _)| Connection::open(stream, &count));
            Some((connection, (listener, count)))
        }))
    }
}

struct Connection {
    stream: UnixStream,
    count: Connections,
}

impl Connection {
    fn open(stream: UnixStream, count: &Connections) -> Self {
        count.0.send_modify(|count| *count += 1);
        Self { stream, count: count.clone() }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.count.0.send_modify(|count| *count -= 1);
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
