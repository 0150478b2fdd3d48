//! `delete`: containerd has lost the connection to a container's daemon, or a create failed half-way.
//!
//! It has five seconds, for every container of a dead daemon, and the answer must come although nothing is left to
//! clean. So every step is bounded and none can fail the verb: a living daemon is told to end this one container, a
//! dead one's socket is removed, a native container is killed and removed through runc, a root filesystem that is still
//! mounted is let go.

use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use containerd_shim::api::{DeleteRequest, DeleteResponse, KillRequest};
use containerd_shim::protos::protobuf::Message as _;
use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim::protos::ttrpc;
use containerd_shim::protos::{Client, TaskClient};
use containerd_shim::{Context as CallContext, Flags};
use rustix::mount::{UnmountFlags, unmount};

use crate::bundle;
use crate::cgroup;
use crate::socket;

const SIGKILL: u32 = 9;

/// All that a living daemon gets; with the lock below it stays clear of containerd's five seconds.
const DAEMON_WAIT: Duration = Duration::from_secs(3);
const LOCK_WAIT: Duration = Duration::from_secs(1);
/// For runc to kill and remove a native container, mostly after a daemon that is dead and cost no wait.
const RUNC_WAIT: Duration = Duration::from_secs(3);

/// A guest is gone within 100 ms of a SIGKILL: asking again after a moment is enough.
const RETRY: Duration = Duration::from_millis(20);

/// Nobody mounts one root filesystem more often than this.
const MAX_STACKED_MOUNTS: usize = 16;

/// Returns the bytes of a `DeleteResponse`.
pub fn delete(flags: &Flags) -> Result<Vec<u8>> {
    let bundle = match flags.bundle.as_str() {
        "" => std::env::current_dir().context("neither -bundle nor a working directory")?,
        path => path.into(),
    };
    let told = bundle::read_address(&bundle).and_then(|socket| end_container(&socket, flags));
    // Native containers outlive the daemon that started them. Nobody reads an error: the reply is all that counts.
    let _ = troupe_actors::clean_up_native(&bundle, RUNC_WAIT);
    unmount_rootfs(&bundle);
    if told.is_none()
        && let Some(cgroup) = cgroup::of_bundle(&bundle)
    {
        cgroup::remove(&cgroup);
    }
    Ok(told.unwrap_or_else(killed_now).write_to_bytes()?)
}

/// The daemon's own word on how the container ended, when it lives and knows it.
fn end_container(socket: &Path, flags: &Flags) -> Option<DeleteResponse> {
    // An error (no permission, a lock held too long) says nothing about the daemon: calling it is the better test.
    if socket::remove_dead(socket, LOCK_WAIT).unwrap_or(false) {
        return None;
    }
    let (sender, receiver) = mpsc::channel();
    let (address, id, namespace) = (bundle::address_of(socket), flags.id.clone(), flags.namespace.clone());
    // In a thread, because connecting to a daemon whose queue is full has no timeout. It ends with this process.
    thread::spawn(move || sender.send(kill_and_delete(&address, &id, &namespace)));
    receiver.recv_timeout(DAEMON_WAIT).ok()?.ok()
}

fn kill_and_delete(address: &str, id: &str, namespace: &str) -> Result<DeleteResponse, ttrpc::Error> {
    let deadline = Instant::now() + DAEMON_WAIT;
    let client = TaskClient::new(Client::connect(address)?);
    let context = || {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let mut context = ttrpc::context::with_duration(left);
        context.add("containerd-namespace-ttrpc".to_owned(), namespace.to_owned());
        context
    };
    let kill = KillRequest { id: id.to_owned(), signal: SIGKILL, all: true, ..Default::default() };
    // Fails when the container has exited before: the delete is the answer either way.
    let _ = client.kill(context(), &kill);
    delete_once_dead(&client, context, id, deadline)
}

fn delete_once_dead(
    client: &TaskClient,
    context: impl Fn() -> CallContext,
    id: &str,
    deadline: Instant,
) -> Result<DeleteResponse, ttrpc::Error> {
    let request = DeleteRequest { id: id.to_owned(), ..Default::default() };
    loop {
        match client.delete(context(), &request) {
            Err(ttrpc::Error::RpcStatus(status))
                if status.code() == ttrpc::Code::FAILED_PRECONDITION && Instant::now() < deadline =>
            {
                thread::sleep(RETRY);
            }
            answer => return answer,
        }
    }
}

/// What a container that went down with its daemon ended of.
fn killed_now() -> DeleteResponse {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let exited_at = Timestamp {
        seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(now.subsec_nanos()).unwrap_or_default(),
        ..Default::default()
    };
    DeleteResponse { exit_status: 128 + SIGKILL, exited_at: Some(exited_at).into(), ..Default::default() }
}

/// The daemon mounts in a namespace of its own, which dies with it; this is for what others left in ours.
fn unmount_rootfs(bundle: &Path) {
    let rootfs = bundle.join("rootfs");
    let unmounted = || unmount(&rootfs, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok();
    for _ in 0..MAX_STACKED_MOUNTS {
        if !unmounted() {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_left_is_reported_as_killed_now() {
        let empty = tempfile::tempdir().unwrap();
        let flags = Flags { id: "x".into(), bundle: empty.path().display().to_string(), ..Default::default() };
        let response = DeleteResponse::parse_from_bytes(&delete(&flags).unwrap()).unwrap();
        assert_eq!(response.exit_status, 137);
        assert!(response.exited_at.seconds > 1_600_000_000);
    }
}
