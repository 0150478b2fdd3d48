//! From a host name to addresses, as the container sees them.
//!
//! ```text
//! 10.0.0.1, [::1] ──────────────────────────────▶ itself
//! db.internal ──▶ the container's hosts file ───▶ its lines, in order
//!                   └─ localhost, without a line ▶ the loopback addresses
//!                   └─ on the host's network ────▶ the host's look-up (getaddrinfo)
//!                   └─ in a pod's network ───────▶ nobody to ask yet
//! ```
//! The hosts file is read anew each time, so that a change shows; that is once for a connection, not for a request.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::Semaphore;

use super::failure::Failure;
use super::files;

/// What is read of a hosts file; the rest of a larger one does not count.
const MAX_HOSTS: u64 = 1 << 20;

/// Look-ups of one container at once. Each holds a thread of the process for as long as the host's name servers please,
/// even when nobody waits for it any more.
const MAX_LOOKUPS: usize = 8;

/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 16;

/// The names of one container.
#[derive(Debug)]
pub(super) struct Resolver {
    rootfs: Option<PathBuf>,
    /// What is mounted over its /etc/hosts, on the host.
    mounted: Option<PathBuf>,
    on_host: bool,
    lookups: Arc<Semaphore>,
}

impl Resolver {
    pub(super) fn new(rootfs: Option<PathBuf>, mounted: Option<PathBuf>, on_host: bool) -> Self {
        Self { rootfs, mounted, on_host, lookups: Arc::new(Semaphore::new(MAX_LOOKUPS)) }
    }

    /// The addresses of `host`, a host of a URI; at least one.
    ///
    /// # Errors
    /// `Dns` in words.
    pub(super) async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, Failure> {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if let Ok(address) = bare.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let listed = self.in_hosts_file(bare).await?;
        let found = match (listed.is_empty(), is_localhost(bare)) {
            (false, _) => listed,
            (true, true) => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
            (true, false) if self.on_host => self.ask_host(bare, port).await?,
            (true, false) => return Err(nobody_to_ask(bare)),
        };
        Ok(found.into_iter().take(MAX_ADDRESSES).map(|address| SocketAddr::new(address, port)).collect())
    }

    async fn in_hosts_file(&self, name: &str) -> Result<Vec<IpAddr>, Failure> {
        let (rootfs, mounted, name) = (self.rootfs.clone(), self.mounted.clone(), name.to_owned());
        let read = tokio::task::spawn_blocking(move || {
            let file = match (mounted, rootfs) {
                (Some(file), _) => files::read_at(&file, MAX_HOSTS),
                (None, Some(rootfs)) => files::read_in(&rootfs, Path::new("/etc/hosts"), MAX_HOSTS),
                (None, None) => return Vec::new(),
            };
            // Not there or not readable: as if empty, as for every resolver.
            file.map_or_else(|_| Vec::new(), |(text, _)| addresses(&String::from_utf8_lossy(&text), &name))
        });
        read.await.map_err(|e| Failure::Internal(format!("reading the hosts file: {e}")))
    }

    async fn ask_host(&self, name: &str, port: u16) -> Result<Vec<IpAddr>, Failure> {
        let permit = Arc::clone(&self.lookups).acquire_owned().await;
        let permit = permit.map_err(|e| Failure::Internal(e.to_string()))?;
        let question = name.to_owned();
        let asked = tokio::task::spawn_blocking(move || {
            let answer = (question.as_str(), port).to_socket_addrs();
            // Held by the thread, not by the caller: the caller may leave long before the name server gives up.
            drop(permit);
            answer
        });
        let answer = asked.await.map_err(|e| Failure::Internal(format!("looking up a name: {e}")))?;
        let found: Vec<IpAddr> =
            answer.map_err(|e| Failure::Dns(format!("{name}: {e}")))?.map(|addr| addr.ip()).collect();
        if found.is_empty() { Err(Failure::Dns(format!("{name}: the name has no address"))) } else { Ok(found) }
    }
}

fn nobody_to_ask(name: &str) -> Failure {
    Failure::Dns(format!(
        "{name}: not in the container's /etc/hosts, and name servers cannot be asked from a pod's network yet; \
         use an address, or add the name to /etc/hosts"
    ))
}

fn is_localhost(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost")
}

/// The addresses that a hosts file (hosts(5)) has for `name`.
fn addresses(hosts: &str, name: &str) -> Vec<IpAddr> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let lines = hosts.lines().map(|line| line.split_once('#').map_or(line, |(entry, _comment)| entry));
    lines
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let address = words.next()?.parse::<IpAddr>().ok()?;
            words.any(|alias| alias.strip_suffix('.').unwrap_or(alias).eq_ignore_ascii_case(name)).then_some(address)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTS: &str = "127.0.0.1\tlocalhost\n::1 localhost ip6-localhost\n# 10.0.0.9 db\n\
        10.0.0.1 db.internal DB # 10.0.0.8 other\n10.0.0.2   db.internal.\nbad db\n10.0.0.3\n";

    fn pod(rootfs: Option<&Path>, mounted: Option<&Path>) -> Resolver {
        Resolver::new(rootfs.map(Path::to_owned), mounted.map(Path::to_owned), false)
    }

    #[test]
    fn a_hosts_file_is_read_as_its_manual_says() {
        let of = |name| addresses(HOSTS, name).iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        assert_eq!(of("localhost"), "127.0.0.1 ::1");
        assert_eq!(of("Db.Internal."), "10.0.0.1 10.0.0.2");
        assert_eq!(of("db"), "10.0.0.1");
        assert_eq!(of("other"), "");
        assert_eq!(of("10.0.0.3"), "");
    }

    #[tokio::test]
    async fn an_address_is_its_own_answer() {
        let resolver = pod(None, None);
        for (host, addr) in [("10.0.0.1", "10.0.0.1:80"), ("[::1]", "[::1]:80"), ("::1", "[::1]:80")] {
            assert_eq!(resolver.resolve(host, 80).await.unwrap(), [addr.parse().unwrap()]);
        }
    }

    #[tokio::test]
    async fn the_mounted_hosts_file_covers_the_images_and_changes_show() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("etc/hosts"), "10.0.0.1 db").unwrap();
        let image = pod(Some(root.path()), None);
        assert_eq!(image.resolve("db", 5432).await.unwrap(), ["10.0.0.1:5432".parse().unwrap()]);

        let mounted = root.path().join("hosts");
        std::fs::write(&mounted, "10.0.0.2 db").unwrap();
        let covered = pod(Some(root.path()), Some(&mounted));
        assert_eq!(covered.resolve("db", 5432).await.unwrap(), ["10.0.0.2:5432".parse().unwrap()]);
        std::fs::write(&mounted, "10.0.0.3 db").unwrap();
        assert_eq!(covered.resolve("db", 5432).await.unwrap(), ["10.0.0.3:5432".parse().unwrap()]);
    }

    #[tokio::test]
    async fn a_pod_without_a_line_for_a_name_says_what_to_do() {
        let resolver = pod(None, None);
        let error = resolver.resolve("db.example", 80).await.unwrap_err().to_string();
        assert!(error.starts_with("db.example: not in the container's /etc/hosts"), "{error}");
        let loopback = resolver.resolve("api.LOCALHOST.", 80).await.unwrap();
        assert_eq!(loopback, ["127.0.0.1:80".parse().unwrap(), "[::1]:80".parse().unwrap()]);
    }

    #[tokio::test]
    async fn the_host_is_asked_on_its_own_network() {
        let resolver = Resolver::new(None, None, true);
        // Too long a label: refused by the host's look-up itself, no name server is bothered.
        let name = format!("{}.invalid", "a".repeat(64));
        let error = resolver.resolve(&name, 80).await.unwrap_err();
        assert!(matches!(&error, Failure::Dns(why) if why.starts_with(&name)), "{error:?}");
    }
}
