//! Settings of the process, already parsed: units are types, defaults are here and nowhere else.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Everything a user can set about one daemon. The edge fills it from the runtime options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Folder of compiled code, root-only.
    pub cache_dir: PathBuf,
    /// How many bytes that folder may hold before the longest unused entries are evicted.
    pub cache_max_size: u64,
    /// How long one compile may take, by the clock.
    pub compile_timeout: Duration,
    /// How much memory one compile may use, in bytes.
    pub compile_memory: u64,
    /// Largest wasm file that is read and compiled, in bytes.
    pub max_module_size: u64,
    /// How long the daemon stays after its last container.
    pub idle_timeout: Duration,
    /// How long containers have to end after SIGTERM to the daemon before they are cut off.
    pub drain_timeout: Duration,
    /// Whether guests may have sockets.
    pub sockets: SocketPolicy,
    /// What servers are told unless they say otherwise, by the keys of the runtime options (`http_…`).
    pub http: BTreeMap<String, String>,
    /// How runc is called for native containers, unless one says otherwise.
    pub runc: RuncOptions,
}

/// Those of runc's own runtime options that act on native containers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuncOptions {
    /// Name or path of the binary; `runc` without it.
    pub binary: Option<String>,
    /// Folder of its state; containerd's own plus `runc` without it.
    pub root: Option<PathBuf>,
    /// Cgroups are made by systemd. So they are, unasked, for a cgroup path that is meant for it.
    pub systemd_cgroup: bool,
    pub no_pivot_root: bool,
    pub no_new_keyring: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            cache_dir: "/var/cache/troupe".into(),
            cache_max_size: 4 << 30,
            compile_timeout: Duration::from_secs(300),
            compile_memory: 2 << 30,
            max_module_size: 256 << 20,
            idle_timeout: Duration::from_secs(5),
            drain_timeout: Duration::from_secs(10),
            sockets: SocketPolicy::Allow,
            http: BTreeMap::new(),
            runc: RuncOptions::default(),
        }
    }
}

/// Whether guests may have sockets of their own (wasi:sockets). Servers listen, and send requests, whatever it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SocketPolicy {
    /// As any container: in the pod's network, whatever that reaches.
    #[default]
    Allow,
    /// No sockets, and no names.
    Deny,
}

/// It is none of the two.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a policy for sockets; choose one of allow, deny")]
pub struct NotASocketPolicy(String);

impl FromStr for SocketPolicy {
    type Err = NotASocketPolicy;

    fn from_str(text: &str) -> Result<Self, NotASocketPolicy> {
        match text {
            "allow" => Ok(Self::Allow),
            "deny" => Ok(Self::Deny),
            other => Err(NotASocketPolicy(other.to_owned())),
        }
    }
}
