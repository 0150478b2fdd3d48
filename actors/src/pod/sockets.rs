//! Sockets in the network of a pod.
//!
//! ```text
//!  host's network    Network ── socket(), bind() ──▶ at once
//!  pod's network     Network ── setns() ── the same calls ── setns() ──▶
//! ```
//! Servers, outgoing requests, name look-ups and the guests' own sockets are made here; no call blocks.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::net::TcpSocket;

use super::netns::NetNs;
use crate::error::{Error, Result};

/// The network of a pod. Does not keep it: once the pod's anchor is gone, every call fails.
#[derive(Debug, Clone)]
pub struct Network(Option<Weak<NetNs>>);

impl Network {
    /// The host's network: there is no other to go to.
    pub fn host() -> Self {
        Self(None)
    }

    /// Whether it is the host's.
    pub fn is_host(&self) -> bool {
        self.0.is_none()
    }

    /// That of a pod that is gone.
    #[cfg(test)]
    pub fn nowhere() -> Self {
        Self(Some(Weak::new()))
    }

    pub(super) fn of(netns: &Arc<NetNs>) -> Self {
        Self(Some(Arc::downgrade(netns)))
    }

    /// Runs `job` with this network as the thread's own: for system calls that do not block, never across an `.await`.
    ///
    /// # Errors
    /// `NotConnected` when the pod is gone, or the kernel's refusal; `job` has not run then.
    pub fn inside<T>(&self, job: impl FnOnce() -> T) -> io::Result<T> {
        match &self.0 {
            None => Ok(job()),
            Some(netns) => netns.upgrade().ok_or_else(gone)?.inside(job),
        }
    }

    /// A socket of this address, not blocking, on which [`listen`] makes a server.
    ///
    /// # Errors
    /// `Host` with the address and the cause.
    pub fn bind(&self, addr: SocketAddr) -> Result<OwnedFd> {
        let bound = self.inside(|| bound(&addr)).and_then(|bound| Ok(bound?));
        bound.map_err(|e| Error::host(format!("listen on {addr}"), e))
    }

    /// A socket that can connect to `peer`: not blocking, without delay. Call within a runtime's reach.
    ///
    /// # Errors
    /// The kernel's refusal, `NotConnected` when the pod is gone.
    pub fn socket(&self, peer: &SocketAddr) -> io::Result<TcpSocket> {
        let fd = self.inside(|| fresh(family(peer), SocketType::STREAM))??;
        // Small writes leave at once: both ends of HTTP wait for each other.
        sockopt::set_tcp_nodelay(&fd, true)?;
        Ok(TcpSocket::from_std_stream(TcpStream::from(fd)))
    }

    /// A socket for datagrams, bound to `addr`. Call within a runtime's reach.
    ///
    /// # Errors
    /// The kernel's refusal, `NotConnected` when the pod is gone.
    pub fn datagrams(&self, addr: &SocketAddr) -> io::Result<tokio::net::UdpSocket> {
        let fd = self.inside(|| fresh(family(addr), SocketType::DGRAM))??;
        rustix::net::bind(&fd, addr)?;
        tokio::net::UdpSocket::from_std(UdpSocket::from(fd))
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the pod is gone")
}

fn family(addr: &SocketAddr) -> AddressFamily {
    if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

fn fresh(family: AddressFamily, kind: SocketType) -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}

fn bound(addr: &SocketAddr) -> rustix::io::Result<OwnedFd> {
    let fd = fresh(family(addr), SocketType::STREAM)?;
    // A restarted container takes its port back although connections of its predecessor linger.
    sockopt::set_socket_reuseaddr(&fd, true)?;
    rustix::net::bind(&fd, addr)?;
    Ok(fd)
}

/// Lets connections come, from any thread. The kernel holds up to `backlog` of them until they are accepted (at most
/// `net.core.somaxconn` of the socket's network).
///
/// # Errors
/// `Host` when somebody else listens there by now.
pub fn listen(socket: OwnedFd, addr: SocketAddr, backlog: u32) -> Result<TcpListener> {
    rustix::net::listen(&socket, i32::try_from(backlog).unwrap_or(i32::MAX))
        .map_err(|e| Error::host(format!("listen on {addr}"), e))?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::{Namespace, Namespaces};
    use crate::pod::Anchor;

    fn any() -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    async fn listening(network: &Network, addr: SocketAddr) -> Result<TcpListener> {
        listen(network.bind(addr)?, addr, 8)
    }

    #[tokio::test]
    async fn a_listener_of_the_host_accepts_a_socket_of_the_host() {
        let listener = listening(&Network::host(), any()).await.unwrap();
        let addr = listener.local_addr().unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let socket = Network::host().socket(&addr).unwrap();
        let (accepted, connected) = tokio::join!(listener.accept(), socket.connect(addr));
        assert_eq!(accepted.unwrap().1, connected.unwrap().local_addr().unwrap());
    }

    #[tokio::test]
    async fn a_taken_port_is_named_with_the_cause() {
        let holder = listening(&Network::host(), any()).await.unwrap();
        let addr = holder.local_addr().unwrap();
        let error = listening(&Network::host(), addr).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("listen on {addr}: Address already in use")), "{error}");
    }

    #[tokio::test]
    async fn a_pod_has_its_own_ports_until_it_is_gone() {
        let namespaces = Namespaces { network: Namespace::New, ..Default::default() };
        let anchor = match Anchor::start(&namespaces, None) {
            Err(Error::Host { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => return,
            anchor => anchor.unwrap(),
        };
        let (pod, host) = (anchor.network(), Network::host());
        let on_host = listening(&host, "0.0.0.0:0".parse().unwrap()).await.unwrap();
        // The same port twice: in two networks.
        let addr = on_host.local_addr().unwrap();
        let in_pod = listening(&pod, addr).await.unwrap();
        assert_eq!(in_pod.local_addr().unwrap(), addr);
        // No interface of the new network is up, so there is no way to anywhere.
        let peer = SocketAddr::from(([127, 0, 0, 1], addr.port()));
        assert!(pod.socket(&peer).unwrap().connect(peer).await.is_err());
        assert!(host.socket(&peer).unwrap().connect(peer).await.is_ok());

        tokio::task::spawn_blocking(move || drop(anchor)).await.unwrap();
        let error = pod.bind(any()).unwrap_err().to_string();
        assert_eq!(error, "listen on 127.0.0.1:0: the pod is gone");
        assert_eq!(pod.socket(&peer).unwrap_err().kind(), io::ErrorKind::NotConnected);
    }
}
