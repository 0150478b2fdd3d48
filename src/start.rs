//! `start`: containerd asks which address serves a container.
//!
//! ```text
//! request ─▶ annotations + options ─▶ the pod's own daemon, if it lives ──┬─▶ address ─▶ reply
//!                                  └▶ group key ─▶ reuse or launch ───────┘
//! ```
//! Runs for every container, so it answers in milliseconds: no runtime, no engine, a handful of files. Invariant: the
//! caller prints what is returned here and nothing else, because containerd reads stdout and stderr as one text.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use containerd_shim::{Flags, StartOpts};

use crate::bootstrap::{self, LegacyEnv};
use crate::bundle::{self, Annotations};
use crate::group::{BuildId, GroupKey, GroupKind};
use crate::launch::{self, ServeArgs};
use crate::options::Options;
use crate::socket::{self, LOCK_WAIT};

/// Where containerd keeps the sockets of shims, unless it says otherwise.
const SOCKET_DIR: &str = "/run/containerd/s";

/// Returns the bytes of the reply.
pub fn start(flags: &Flags) -> Result<Vec<u8>> {
    let bundle = env::current_dir().context("the working directory (the bundle) is gone")?;
    let input = bootstrap::read_stdin()?;
    let (request, reply) = bootstrap::parse(&input, flags, LegacyEnv::read())?;
    let annotations = Annotations::read(&bundle)?;
    let socket = match daemon_of_pod(&bundle, &annotations) {
        Some(socket) => socket,
        None => daemon_of_group(request, &bundle, &annotations)?,
    };
    let address = bundle::address_of(&socket);
    bundle::write_address(&bundle, &address)?;
    reply.encode(&address)
}

/// A pod lives in one process: its members follow the sandbox, even when meanwhile the binary was upgraded, the options
/// were changed, or an annotation of one member says otherwise. containerd 2 does the same before it asks us at all.
fn daemon_of_pod(bundle: &Path, annotations: &Annotations) -> Option<PathBuf> {
    let socket = bundle::read_address(&annotations.sandbox_bundle(bundle)?)?;
    let lock = socket::lock_socket_dir(socket.parent()?, LOCK_WAIT).ok()?;
    let alive = socket::is_alive(&socket, &lock).ok()? && socket::touch(&socket, &lock).is_ok();
    alive.then_some(socket)
}

fn daemon_of_group(request: StartOpts, bundle: &Path, annotations: &Annotations) -> Result<PathBuf> {
    let options = Options::from_extensions(&request.extensions)?;
    let identity = (request.id.as_str(), request.namespace.as_str(), request.address.as_str());
    let key = GroupKey::new(identity, annotations, &options, &BuildId::current()?)?;
    let socket = key.socket(Path::new(request.socket_dir.as_deref().unwrap_or(SOCKET_DIR)))?;
    let args = ServeArgs {
        socket,
        containerd_address: request.address,
        ttrpc_address: request.ttrpc_address,
        namespace: request.namespace,
        group: key.description().to_owned(),
        bundle: bundle.to_owned(),
        cgroup: annotations.cgroup.clone().filter(|_| key.kind() == GroupKind::Pod),
        debug: request.debug,
        options,
    };
    launch::reuse_or_launch(&args)?;
    Ok(args.socket)
}
