//! From a name to addresses, as a container sees them.
//!
//! ```text
//! 10.0.0.1, ::1 ────────────────────────────────▶ itself
//! db.internal ──▶ the container's hosts file ───▶ its lines, in order
//!                   └─ localhost, without a line ▶ the loopback addresses
//!                   └─ the name servers ─────────▶ of its resolv.conf, asked in the pod's network
//! ```
//! Both files are read anew each time, so that a change shows; that is once for a connection, not for a request. The host's
//! own look-up (getaddrinfo) is not used: it knows neither the pod's network nor its files, and holds a thread for as
//! long as a name server pleases. Outgoing requests and wasi:sockets ask.

mod servers;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Semaphore;

use crate::files;
use crate::pod::Network;
use servers::Servers;

/// What is read of a hosts file or a resolv.conf; the rest of a larger one does not count.
const MAX_FILE: u64 = 1 << 20;

/// Look-ups of one container that name servers work at, at once; further ones wait.
const MAX_LOOKUPS: usize = 32;

/// Addresses of one name that are told.
const MAX_ADDRESSES: usize = 16;

/// Where a container's names come from.
#[derive(Debug, Clone)]
pub struct NameFiles {
    /// Its root filesystem on the host.
    pub rootfs: Option<PathBuf>,
    /// What the spec mounts over its /etc/hosts and /etc/resolv.conf, on the host.
    pub hosts: Option<PathBuf>,
    pub resolv_conf: Option<PathBuf>,
}

/// Why there is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// Nobody knows the name.
    #[error("{0}: no such name in /etc/hosts or at the name servers")]
    NotFound(String),
    /// No name server answered in the time that resolv.conf gives them.
    #[error("{0}: no name server answered in time")]
    Timeout(String),
    /// They could not be asked, or their answer makes no sense.
    #[error("{name}: {why}")]
    Failed { name: String, why: String },
}

/// The names of one container.
#[derive(Debug)]
pub struct Names {
    files: NameFiles,
    network: Network,
    /// Made when first asked for.
    servers: Mutex<Option<Arc<Servers>>>,
    lookups: Semaphore,
}

impl Names {
    /// The names of a container in `network`. Cheap: reads and starts nothing.
    pub fn new(files: NameFiles, network: Network) -> Self {
        Self { files, network, servers: Mutex::default(), lookups: Semaphore::new(MAX_LOOKUPS) }
    }

    /// The addresses of `name`, or the address that it is; at least one.
    ///
    /// # Errors
    /// Why there is none. Without a limit of time but that of resolv.conf for each server.
    pub async fn lookup(&self, name: &str) -> Result<Vec<IpAddr>, LookupError> {
        if let Ok(address) = name.parse::<IpAddr>() {
            return Ok(vec![address]);
        }
        let wanted = name.to_owned();
        // Not there or not readable: as if empty, as for every resolver.
        let listed = self.read(Etc::Hosts, move |text| addresses(&String::from_utf8_lossy(&text), &wanted)).await;
        let mut found = match listed.unwrap_or_default() {
            listed if !listed.is_empty() => listed,
            _ if is_localhost(name) => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
            _ => self.ask(name).await?,
        };
        found.truncate(MAX_ADDRESSES);
        Ok(found)
    }

    async fn ask(&self, name: &str) -> Result<Vec<IpAddr>, LookupError> {
        let failed = |why: &str| LookupError::Failed { name: name.to_owned(), why: why.to_owned() };
        let _permit = self.lookups.acquire().await.map_err(|e| failed(&e.to_string()))?;
        let conf = self.read(Etc::ResolvConf, |text| text).await;
        let conf =
            conf.ok_or_else(|| failed("not in /etc/hosts, and the container has no /etc/resolv.conf to ask by"))?;
        let servers = self.servers(conf).map_err(|why| failed(&why))?;
        servers.lookup(name).await
    }

    /// The servers that this resolv.conf names.
    fn servers(&self, conf: Vec<u8>) -> Result<Arc<Servers>, String> {
        let mut kept = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some(servers) if servers.are_of(&conf) => Ok(Arc::clone(servers)),
            _ => {
                let servers = Arc::new(Servers::new(conf, self.network.clone())?);
                Ok(Arc::clone(kept.insert(servers)))
            }
        }
    }

    /// What `parse` makes of a file; `None` when there is none.
    async fn read<T: Send + 'static>(&self, etc: Etc, parse: impl FnOnce(Vec<u8>) -> T + Send + 'static) -> Option<T> {
        let (files, on_host) = (self.files.clone(), self.network.is_host());
        let read = tokio::task::spawn_blocking(move || etc.read(&files, on_host).map(parse));
        read.await.ok().flatten()
    }
}

/// A file of /etc.
#[derive(Debug, Clone, Copy)]
enum Etc {
    Hosts,
    ResolvConf,
}

impl Etc {
    fn read(self, files: &NameFiles, on_host: bool) -> Option<Vec<u8>> {
        let (mounted, path) = match self {
            Self::Hosts => (&files.hosts, Path::new("/etc/hosts")),
            Self::ResolvConf => (&files.resolv_conf, Path::new("/etc/resolv.conf")),
        };
        let of_the_container = match (mounted, &files.rootfs) {
            (Some(file), _) => files::read_at(file, MAX_FILE).ok(),
            (None, Some(rootfs)) => files::read_in(rootfs, path, MAX_FILE).ok(),
            (None, None) => None,
        };
        // On the host's network the host's name servers are the right ones, whoever forgot to say so.
        let of_the_host =
            || (on_host && matches!(self, Self::ResolvConf)).then(|| files::read_at(path, MAX_FILE).ok()).flatten();
        of_the_container.or_else(of_the_host).map(|(text, _whole)| text)
    }
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

    fn names(rootfs: Option<&Path>, hosts: Option<&Path>, resolv_conf: Option<&Path>) -> Names {
        let owned = |path: Option<&Path>| path.map(Path::to_owned);
        Names::new(
            NameFiles { rootfs: owned(rootfs), hosts: owned(hosts), resolv_conf: owned(resolv_conf) },
            Network::nowhere(),
        )
    }

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
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
        let names = names(None, None, None);
        for address in ["10.0.0.1", "::1"] {
            assert_eq!(names.lookup(address).await.unwrap(), ips(&[address]));
        }
    }

    #[tokio::test]
    async fn the_mounted_hosts_file_covers_the_images_and_changes_show() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("etc/hosts"), "10.0.0.1 db").unwrap();
        assert_eq!(names(Some(root.path()), None, None).lookup("db").await.unwrap(), ips(&["10.0.0.1"]));

        let mounted = root.path().join("hosts");
        std::fs::write(&mounted, "10.0.0.2 db").unwrap();
        let covered = names(Some(root.path()), Some(&mounted), None);
        assert_eq!(covered.lookup("db").await.unwrap(), ips(&["10.0.0.2"]));
        std::fs::write(&mounted, "10.0.0.3 db").unwrap();
        assert_eq!(covered.lookup("db").await.unwrap(), ips(&["10.0.0.3"]));
    }

    #[tokio::test]
    async fn a_pod_without_name_servers_says_so() {
        let error = names(None, None, None).lookup("db.example").await.unwrap_err().to_string();
        assert!(
            error.starts_with("db.example: not in /etc/hosts, and the container has no /etc/resolv.conf"),
            "{error}"
        );
        let loopback = names(None, None, None).lookup("api.LOCALHOST.").await.unwrap();
        assert_eq!(loopback, ips(&["127.0.0.1", "::1"]));
        let root = tempfile::tempdir().unwrap();
        let conf = root.path().join("resolv.conf");
        std::fs::write(&conf, "search example\n").unwrap();
        let error = names(None, None, Some(&conf)).lookup("db").await.unwrap_err().to_string();
        assert!(error.contains("/etc/resolv.conf names no name server"), "{error}");
    }
}
