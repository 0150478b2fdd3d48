//! A guest's own sockets and names: wasi:sockets, in the network of its pod.
//!
//! wasmtime-wasi knows the network of the thread it runs on and the host's name look-up. So the functions that make a socket
//! run inside the pod's network, and those that look up a name are ours; all others are the stock ones, because a socket
//! stays in the network it was made in.
//!
//! Linked over the stock functions, by name: `program.rs` (commands) and `visitor.rs` (servers).

use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, Resource, ResourceType};
use wasmtime_wasi::p2::bindings::sockets::network::{ErrorCode, IpAddress, IpAddressFamily, Network as NetworkHandle};
use wasmtime_wasi::p2::bindings::sockets::{tcp_create_socket, udp_create_socket};
use wasmtime_wasi::p2::{Pollable, SocketError, subscribe};
use wasmtime_wasi::p3::bindings::sockets::ip_name_lookup::ErrorCode as P3LookupError;
use wasmtime_wasi::p3::bindings::sockets::types::{self as p3, HostTcpSocket, HostUdpSocket};
use wasmtime_wasi::sockets::{TcpSocket as P3TcpSocket, UdpSocket as P3UdpSocket, WasiSocketsView};
use wasmtime_wasi::{WasiCtxBuilder, WasiView};

use super::engine::Kind;
use crate::names::{LookupError, Names};
use crate::pod::Network;
use crate::users::{at_home, home};

/// What a container's guests may do with the network.
#[derive(Debug, Clone)]
pub struct Sockets {
    /// `None`: nothing.
    reach: Option<Arc<Reach>>,
}

#[derive(Debug)]
struct Reach {
    network: Network,
    names: Arc<Names>,
}

impl Sockets {
    /// Sockets in this network, as a container of any kind has them.
    pub fn allowed(network: Network, names: Arc<Names>) -> Self {
        Self { reach: Some(Arc::new(Reach { network, names })) }
    }

    /// No sockets and no names.
    pub fn denied() -> Self {
        Self { reach: None }
    }

    /// Tells the stock implementation.
    pub(super) fn set_up(&self, builder: &mut WasiCtxBuilder) {
        let allowed = self.reach.is_some();
        builder.allow_tcp(allowed).allow_udp(allowed).allow_ip_name_lookup(allowed);
        if allowed {
            // Every address: the pod's network is the border.
            builder.inherit_network();
        }
    }

    /// Runs `job` where the sockets of the guest belong. Denied ones are made nowhere: the stock implementation refuses.
    fn inside<T>(&self, job: impl FnOnce() -> T) -> std::io::Result<T> {
        match &self.reach {
            Some(reach) => reach.network.inside(job),
            None => Ok(job()),
        }
    }

    fn names(&self) -> Option<Arc<Names>> {
        self.reach.as_ref().map(|reach| Arc::clone(&reach.names))
    }
}

impl Default for Sockets {
    fn default() -> Self {
        Self::denied()
    }
}

/// The data of a store whose guest may have sockets.
pub(super) trait HasSockets: WasiView + 'static {
    /// Those of its container.
    fn of_container(&self) -> Sockets;
}

const TCP_CREATE: &str = "wasi:sockets/tcp-create-socket@0.2.12";
const UDP_CREATE: &str = "wasi:sockets/udp-create-socket@0.2.12";
const LOOKUP: &str = "wasi:sockets/ip-name-lookup@0.2.12";
const P3_TYPES: &str = "wasi:sockets/types@0.3.0";
const P3_LOOKUP: &str = "wasi:sockets/ip-name-lookup@0.3.0";

/// Puts ours over the stock functions, which have to be there.
pub(super) fn link<T: HasSockets>(linker: &mut Linker<T>, kind: Kind) -> wasmtime::Result<()> {
    linker.allow_shadowing(true);
    let linked = link_p2(linker).and_then(|()| if kind == Kind::Concurrent { link_p3(linker) } else { Ok(()) });
    linker.allow_shadowing(false);
    linked
}

fn link_p2<T: HasSockets>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
    linker.instance(TCP_CREATE)?.func_wrap(
        "create-tcp-socket",
        |mut store: StoreContextMut<'_, T>, (family,): (IpAddressFamily,)| {
            let sockets = store.data().of_container();
            let mut view = store.data_mut().sockets();
            let made = sockets.inside(|| tcp_create_socket::Host::create_tcp_socket(&mut view, family));
            Ok((told(made.map_err(SocketError::from).flatten())?,))
        },
    )?;
    linker.instance(UDP_CREATE)?.func_wrap_async(
        "create-udp-socket",
        |mut store: StoreContextMut<'_, T>, (family,): (IpAddressFamily,)| {
            Box::new(async move {
                let sockets = store.data().of_container();
                let mut view = store.data_mut().sockets();
                let made = inside(&sockets, udp_create_socket::Host::create_udp_socket(&mut view, family)).await;
                Ok((told(made.map_err(SocketError::from).flatten())?,))
            })
        },
    )?;
    let mut lookup = linker.instance(LOOKUP)?;
    lookup.resource("resolve-address-stream", ResourceType::host::<Addresses>(), |mut store, rep| {
        let stream = Resource::<Addresses>::new_own(rep);
        store.data_mut().ctx().table.delete(stream)?;
        Ok(())
    })?;
    lookup.func_wrap("resolve-addresses", resolve_addresses::<T>)?;
    lookup.func_wrap("[method]resolve-address-stream.resolve-next-address", next_address::<T>)?;
    lookup.func_wrap(
        "[method]resolve-address-stream.subscribe",
        |mut store: StoreContextMut<'_, T>, (stream,): (Resource<Addresses>,)| {
            Ok((subscribe(store.data_mut().ctx().table, stream)?,))
        },
    )
}

fn link_p3<T: HasSockets>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
    let mut types = linker.instance(P3_TYPES)?;
    types.func_wrap(
        "[static]tcp-socket.create",
        |mut store: StoreContextMut<'_, T>, (family,): (p3::IpAddressFamily,)| {
            let sockets = store.data().of_container();
            let mut view = store.data_mut().sockets();
            let made = sockets.inside(|| HostTcpSocket::create(&mut view, family));
            Ok((told_p3::<P3TcpSocket>(made)?,))
        },
    )?;
    types.func_wrap_async(
        "[static]udp-socket.create",
        |mut store: StoreContextMut<'_, T>, (family,): (p3::IpAddressFamily,)| {
            Box::new(async move {
                let sockets = store.data().of_container();
                let mut view = store.data_mut().sockets();
                let made = inside(&sockets, HostUdpSocket::create(&mut view, family)).await;
                Ok((told_p3::<P3UdpSocket>(made)?,))
            })
        },
    )?;
    linker.instance(P3_LOOKUP)?.func_wrap_concurrent("resolve-addresses", |accessor, (name,): (String,)| {
        Box::pin(async move {
            let names = accessor.with(|mut store| store.data_mut().of_container().names());
            let found = match names {
                None => Err(P3LookupError::AccessDenied),
                Some(names) => match domain(&name) {
                    Some(domain) => at_home(names.lookup(&domain)).await.map_err(|error| refused_p3(&error)),
                    None => Err(P3LookupError::InvalidArgument),
                },
            };
            let found: Result<Vec<p3::IpAddress>, _> =
                found.map(|addresses| addresses.into_iter().map(Into::into).collect());
            Ok((found,))
        })
    })
}

/// Polls inside the network: a poll ends before anything else runs on the thread.
async fn inside<T>(sockets: &Sockets, making: impl Future<Output = T>) -> std::io::Result<T> {
    let mut making = pin!(making);
    poll_fn(|cx| match sockets.inside(|| making.as_mut().poll(cx)) {
        Ok(Poll::Ready(made)) => Poll::Ready(Ok(made)),
        Ok(Poll::Pending) => Poll::Pending,
        Err(error) => Poll::Ready(Err(error)),
    })
    .await
}

/// What the guest is told, unless it has to trap.
fn told<T>(made: Result<T, SocketError>) -> wasmtime::Result<Result<T, ErrorCode>> {
    match made {
        Ok(made) => Ok(Ok(made)),
        Err(error) => Ok(Err(error.downcast()?)),
    }
}

type MadeP3<T> = wasmtime_wasi::p3::sockets::SocketResult<Resource<T>>;

fn told_p3<T>(made: std::io::Result<MadeP3<T>>) -> wasmtime::Result<Result<Resource<T>, p3::ErrorCode>> {
    match made {
        Ok(Ok(made)) => Ok(Ok(made)),
        Ok(Err(error)) => Ok(Err(error.downcast()?)),
        Err(error) => Ok(Err(p3::ErrorCode::Other(Some(error.to_string())))),
    }
}

/// Addresses of a name, once they are there.
struct Addresses(State);

enum State {
    /// Looked up by a task of its own, so that it goes on while the guest does something else.
    Asked(tokio::task::JoinHandle<Result<Vec<IpAddr>, LookupError>>),
    Known(Result<std::vec::IntoIter<IpAddr>, ErrorCode>),
}

impl Addresses {
    async fn known(&mut self) -> &mut Result<std::vec::IntoIter<IpAddr>, ErrorCode> {
        if let State::Asked(task) = &mut self.0 {
            let found = match task.await {
                Ok(Ok(addresses)) => Ok(addresses.into_iter()),
                Ok(Err(error)) => Err(refused(&error)),
                Err(_panic) => Err(ErrorCode::Unknown),
            };
            self.0 = State::Known(found);
        }
        match &mut self.0 {
            State::Known(known) => known,
            State::Asked(_) => unreachable!("it was replaced above"),
        }
    }
}

impl Drop for Addresses {
    fn drop(&mut self) {
        if let State::Asked(task) = &self.0 {
            task.abort();
        }
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Addresses {
    async fn ready(&mut self) {
        self.known().await;
    }
}

fn resolve_addresses<T: HasSockets>(
    mut store: StoreContextMut<'_, T>,
    (network, name): (Resource<NetworkHandle>, String),
) -> wasmtime::Result<(Result<Resource<Addresses>, ErrorCode>,)> {
    let names = store.data().of_container().names();
    let table = store.data_mut().ctx().table;
    // The handle says that the guest was given the network at all.
    table.get(&network)?;
    let Some(names) = names else { return Ok((Err(ErrorCode::AccessDenied),)) };
    let Some(domain) = domain(&name) else { return Ok((Err(ErrorCode::InvalidArgument),)) };
    // Not as the guest's user, who need not have the right to read the pod's files on the host.
    let Some(home) = home() else { return Ok((Err(ErrorCode::Unknown),)) };
    let task = home.spawn(async move { names.lookup(&domain).await });
    Ok((Ok(table.push(Addresses(State::Asked(task)))?),))
}

fn next_address<T: HasSockets>(
    mut store: StoreContextMut<'_, T>,
    (stream,): (Resource<Addresses>,),
) -> wasmtime::Result<(Result<Option<IpAddress>, ErrorCode>,)> {
    let addresses = store.data_mut().ctx().table.get_mut(&stream)?;
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    let known = pin!(addresses.known()).poll(&mut cx);
    let next = match known {
        Poll::Pending => Err(ErrorCode::WouldBlock),
        Poll::Ready(Ok(addresses)) => Ok(addresses.next().map(Into::into)),
        Poll::Ready(Err(error)) => Err(*error),
    };
    Ok((next,))
}

/// What can be looked up: an address, or a name that name servers could know (in their own letters, RFC 5891). `[::1]` is
/// an address in a URI, not here, but harmless.
fn domain(name: &str) -> Option<String> {
    let is_address = name.parse::<IpAddr>().is_ok();
    let fits =
        |name: &str| !name.is_empty() && name.len() <= 254 && !name.contains(|c: char| c.is_control() || c == ' ');
    (is_address || fits(name)).then(|| name.to_owned())
}

fn refused(error: &LookupError) -> ErrorCode {
    tracing::debug!(%error, "a guest's name look-up failed");
    match error {
        LookupError::NotFound(_) => ErrorCode::NameUnresolvable,
        LookupError::Timeout(_) => ErrorCode::TemporaryResolverFailure,
        LookupError::Failed { .. } => ErrorCode::PermanentResolverFailure,
    }
}

fn refused_p3(error: &LookupError) -> P3LookupError {
    tracing::debug!(%error, "a guest's name look-up failed");
    match error {
        LookupError::NotFound(_) => P3LookupError::NameUnresolvable,
        LookupError::Timeout(_) => P3LookupError::TemporaryResolverFailure,
        LookupError::Failed { .. } => P3LookupError::PermanentResolverFailure,
    }
}
