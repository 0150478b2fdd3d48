//! The network of a node: a namespace of its own for a containerd that makes pods, with a bridge for them.
//!
//! Nothing of the machine's network is touched: bridge, addresses, forwarding and port mappings are all in here, and gone
//! with it. The namespace is a mount below the base folder, so that the guard finds it should this process be killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{UnmountFlags, unmount};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::json;

use super::{SOON, job};

/// Debian's folder of the CNI plugins.
const PLUGINS: &str = "/usr/lib/cni";

/// The first three numbers of every pod's address.
pub const SUBNET: &str = "10.201.7";

/// Hides the hierarchies of the machine, in a mount namespace of the program's own: what it sees is cgroup v2, of which
/// there is one, wherever it is mounted.
const UNIFIED: &str =
    r#"umount --recursive /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec "$0" "$@""#;

#[derive(Debug)]
pub struct Node {
    network: PathBuf,
    cgroups: Cgroups,
}

/// Which cgroups the programs of a node see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cgroups {
    /// The machine's.
    Machine,
    /// Version 2 alone. Where version 1 has the controllers, it can place, count CPU time, freeze and kill, and not limit.
    Unified,
}

impl Node {
    /// Makes the network, and the CNI configuration in `folder`/cni.
    pub fn create(folder: &Path, cgroups: Cgroups) -> Result<Self> {
        ensure!(
            Path::new(PLUGINS).join("bridge").is_file(),
            "no CNI plugins in {PLUGINS}: run `make test`, which installs them"
        );
        let network = folder.join("network");
        fs::write(&network, "")?;
        let mut unshare = Command::new("unshare");
        unshare.arg(format!("--net={}", network.display())).arg("true");
        job::run(unshare, SOON)?.success("unshare --net")?;
        let node = Self { network, cgroups };
        node.run("ip", &["link", "set", "lo", "up"])?;
        let conf = folder.join("cni");
        fs::create_dir_all(&conf)?;
        fs::write(conf.join("10-pods.conflist"), configuration(folder).to_string())?;
        Ok(node)
    }

    /// A program in here. It stays in the file systems of the machine.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.network.display())).arg(program);
        command
    }

    /// The same for what deals with cgroups.
    pub fn daemon(&self, program: &Path) -> Command {
        match self.cgroups {
            Cgroups::Machine => self.command(program),
            Cgroups::Unified => {
                let mut command = self.command("unshare");
                command.args(["--mount", "--propagation", "slave", "sh", "-c", UNIFIED]).arg(program);
                command
            }
        }
    }

    pub fn cgroups(&self) -> Cgroups {
        self.cgroups
    }

    pub fn run(&self, program: &str, words: &[&str]) -> Result<String> {
        let mut command = self.command(program);
        command.args(words);
        job::run(command, SOON)?.success(&format!("{program} {}", words.join(" ")))
    }

    /// Runs `work` on a thread in here: its sockets are the node's.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let worker = scope.spawn(|| {
                let network = open(&self.network, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
                move_into_link_name_space(rustix::fd::AsFd::as_fd(&network), Some(LinkNameSpaceType::Network))?;
                work()
            });
            worker.join().map_err(|_| anyhow::anyhow!("a client in the node's network panicked"))?
        })
    }

    /// The ends of the pods' cables.
    pub fn veths(&self) -> Result<usize> {
        Ok(self.run("ip", &["-o", "link", "show", "type", "veth"])?.lines().count())
    }

    /// Takes it away, with all that is in it.
    pub fn remove(&self) -> Result<()> {
        unmount(&self.network, UnmountFlags::DETACH).context("the node's network")
    }
}

/// What containerd's CRI is to do for a pod's network.
fn configuration(folder: &Path) -> serde_json::Value {
    let data = folder.join("addresses");
    json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "pods0",
                "isGateway": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": data,
                    "ranges": [[{ "subnet": format!("{SUBNET}.0/24") }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                },
            },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    })
}

/// The part of containerd's configuration that has to do with pods: everything of the machine's stays out of it.
pub fn containerd_config(folder: &Path) -> String {
    let (folder, options) = (folder.display(), folder.join("options.toml"));
    let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
    format!(
        "[{cri}]\nsandbox_image = \"{pause}\"\ndisable_apparmor = true\nrestrict_oom_score_adj = true\nnetns_mounts_under_state_dir = true\n\
         [{cri}.cni]\nbin_dir = \"{PLUGINS}\"\nconf_dir = \"{folder}/cni\"\n\
         [{cri}.containerd]\ndefault_runtime_name = \"wasmtime\"\n\
         [{cri}.containerd.runtimes.wasmtime]\nruntime_type = \"io.containerd.wasmtime.v1\"\n\
         pod_annotations = [\"troupe.dev/*\"]\ncontainer_annotations = [\"troupe.dev/*\"]\n\
         [{cri}.containerd.runtimes.wasmtime.options]\nConfigPath = \"{options}\"\n\
         [{cri}.containerd.runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"\n\
         [plugins.\"io.containerd.nri.v1.nri\"]\ndisable = true\n",
        pause = super::cri::PAUSE,
        options = options.display(),
    )
}
