//! The facts that leave this crate: what happened to which container, in order.
//!
//! The edge turns them into containerd's events. One channel per process keeps the order in which actors said them;
//! for one task that is Create < Start < (Oom <) Exit < Delete, and its execs' before its own exit.

use std::path::PathBuf;
use std::time::SystemTime;

use tokio::sync::mpsc;

use crate::ContainerId;
use crate::stdio::StdioPaths;

/// One fact about one container.
#[derive(Debug, Clone)]
pub struct Event {
    /// Whose fact it is.
    pub id: ContainerId,
    /// When it happened.
    pub at: SystemTime,
    /// What happened.
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone)]
pub enum EventKind {
    /// The container was created: image found, program loaded, root filesystem mounted.
    Created { bundle: PathBuf, stdio: StdioPaths, pid: u32 },
    /// The guest runs.
    Started { pid: u32 },
    /// The guest was ended for exceeding its memory limit; an `Exited` with 137 follows.
    OutOfMemory,
    /// The guest is gone and its output complete.
    Exited { pid: u32, code: u32 },
    /// All its processes stand still.
    Paused,
    /// They go on.
    Resumed,
    /// A further process is to run in it.
    ExecAdded { exec: String },
    /// It runs.
    ExecStarted { exec: String, pid: u32 },
    /// It has ended, its output complete.
    ExecExited { exec: String, pid: u32, code: u32 },
    /// The container and all it held are gone.
    Deleted { pid: u32, code: u32, exited_at: SystemTime },
}

/// Where facts are told. Unbounded by type, bounded by construction: a container tells a few facts, or one for a call of
/// containerd's, and the edge drains this channel into its own bounded queue without ever waiting for containerd.
#[derive(Debug, Clone)]
pub struct Events(mpsc::UnboundedSender<Event>);

impl Events {
    /// The sending half, and the receiver that the edge drains.
    pub fn channel() -> (Self, mpsc::UnboundedReceiver<Event>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    /// Tells a fact that happened now.
    pub fn tell(&self, id: &ContainerId, kind: EventKind) {
        self.tell_at(id, SystemTime::now(), kind);
    }

    /// Tells a fact that happened at `at`.
    pub fn tell_at(&self, id: &ContainerId, at: SystemTime, kind: EventKind) {
        if self.0.send(Event { id: id.clone(), at, kind }).is_err() {
            tracing::error!(container = %id, "event lost: the publisher is gone");
        }
    }
}
