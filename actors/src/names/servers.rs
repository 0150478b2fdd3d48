//! The name servers of a resolv.conf, asked in a pod's network.
//!
//! hickory-resolver knows the protocol (search list, ndots, attempts, TCP where an answer is cut short); here are only the
//! sockets, and the habits of the C library, which resolv.conf is written for: servers in the order of the file, and a
//! server's no is a no.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::time::Duration;

use hickory_resolver::Resolver;
use hickory_resolver::config::{LookupIpStrategy, ResolveHosts, ResolverConfig, ServerOrderingStrategy};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::iocompat::AsyncIoTokioAsStd;
use hickory_resolver::net::runtime::{RuntimeProvider, TokioHandle, TokioTime};
use hickory_resolver::system_conf::parse_resolv_conf;
use tokio::net::{TcpStream, UdpSocket};

use super::LookupError;
use crate::pod::Network;

/// Answers that a container keeps, for as long as the servers said: a few services, not a crawler's.
const CACHE: u64 = 64;
/// The C library asks no more of them (resolv.conf(5), MAXNS).
const MAX_SERVERS: usize = 3;
/// For a connection to a server, where hickory does not say.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The servers of one resolv.conf.
pub(super) struct Servers {
    conf: Vec<u8>,
    resolver: Resolver<PodSockets>,
}

impl std::fmt::Debug for Servers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Servers").finish_non_exhaustive()
    }
}

impl Servers {
    /// The servers that `conf` names.
    ///
    /// # Errors
    /// In words, when it names none.
    pub(super) fn new(conf: Vec<u8>, network: Network) -> Result<Self, String> {
        let parsed = parse_resolv_conf(&conf);
        let (config, mut options) = parsed.map_err(|e| format!("/etc/resolv.conf names no name server: {e}"))?;
        let (domain, search, mut servers) = config.into_parts();
        servers.truncate(MAX_SERVERS);
        for server in &mut servers {
            server.trust_negative_responses = true;
        }
        options.server_ordering_strategy = ServerOrderingStrategy::UserProvidedOrder;
        options.num_concurrent_reqs = 1;
        options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        options.use_hosts_file = ResolveHosts::Never;
        options.os_port_selection = true;
        options.cache_size = CACHE;
        let config = ResolverConfig::from_parts(domain, search, servers);
        let mut builder = Resolver::builder_with_config(config, PodSockets { network, handle: TokioHandle::default() });
        *builder.options_mut() = options;
        let resolver = builder.build().map_err(|e| format!("/etc/resolv.conf: {e}"))?;
        Ok(Self { conf, resolver })
    }

    /// Whether they are those of this file.
    pub(super) fn are_of(&self, conf: &[u8]) -> bool {
        self.conf == conf
    }

    /// The addresses of `name`, those of IPv4 first; at least one.
    pub(super) async fn lookup(&self, name: &str) -> Result<Vec<IpAddr>, LookupError> {
        let found = self.resolver.lookup_ip(name).await.map_err(|error| refused(name, &error))?;
        let mut addresses: Vec<IpAddr> = found.iter().collect();
        addresses.sort_by_key(IpAddr::is_ipv6);
        if addresses.is_empty() { Err(LookupError::NotFound(name.to_owned())) } else { Ok(addresses) }
    }
}

fn refused(name: &str, error: &NetError) -> LookupError {
    let name = name.to_owned();
    match error {
        NetError::Timeout => LookupError::Timeout(name),
        error if error.is_nx_domain() || error.is_no_records_found() => LookupError::NotFound(name),
        error => LookupError::Failed { name, why: format!("asking the name servers: {error}") },
    }
}

/// Makes hickory's sockets in the pod's network.
#[derive(Clone)]
struct PodSockets {
    network: Network,
    handle: TokioHandle,
}

type Making<T> = Pin<Box<dyn Future<Output = io::Result<T>> + Send>>;

impl RuntimeProvider for PodSockets {
    type Handle = TokioHandle;
    type Timer = TokioTime;
    type Udp = UdpSocket;
    type Tcp = AsyncIoTokioAsStd<TcpStream>;

    fn create_handle(&self) -> TokioHandle {
        self.handle.clone()
    }

    fn connect_tcp(&self, server: SocketAddr, _: Option<SocketAddr>, patience: Option<Duration>) -> Making<Self::Tcp> {
        let network = self.network.clone();
        Box::pin(async move {
            let connected = network.socket(&server)?.connect(server);
            let connected = tokio::time::timeout(patience.unwrap_or(CONNECT_TIMEOUT), connected).await;
            Ok(AsyncIoTokioAsStd(connected.map_err(|_| io::ErrorKind::TimedOut)??))
        })
    }

    fn bind_udp(&self, local: SocketAddr, _server: SocketAddr) -> Making<UdpSocket> {
        let socket = self.network.datagrams(&local);
        Box::pin(async move { socket })
    }
}
