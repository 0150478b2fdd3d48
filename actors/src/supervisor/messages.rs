//! The verbs of the shim API, as the edge says them.

use std::time::Duration;

use actix::Message;
use oci_spec::runtime::LinuxResources;
use tokio::sync::oneshot;

use crate::ContainerId;
use crate::container::{Blueprint, Exit, Handle};
use crate::error::Result;

/// Makes a container: answers when it could be started at once.
#[derive(Message)]
#[rtype(result = "Result<Handle>")]
pub struct Create {
    pub id: ContainerId,
    pub blueprint: Blueprint,
}

/// Runs a created container; answers with its pid.
#[derive(Message)]
#[rtype(result = "Result<u32>")]
pub struct Start(pub ContainerId);

/// Signals a container. Carries its own reply, so that a caller who gives up does not take the signal back: send it with
/// `do_send`.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Kill {
    pub id: ContainerId,
    /// Number of the signal, as in signal(7).
    pub signal: u32,
    /// Not its first process only.
    pub all: bool,
    pub reply: oneshot::Sender<Result<()>>,
}

/// Changes the limits of a container, as far as it has not ended.
#[derive(Message)]
#[rtype(result = "Result<()>")]
pub struct Update {
    pub id: ContainerId,
    /// What changes; what it does not name stays.
    pub resources: Box<LinuxResources>,
}

/// Removes a container that does not run: answers with its exit when all it held is gone.
#[derive(Message)]
#[rtype(result = "Result<Exit>")]
pub struct Delete(pub ContainerId);

/// A verb for one container that concerns nobody else: it is passed on.
pub struct Pass<M> {
    pub id: ContainerId,
    pub message: M,
}

impl<M: Message> Message for Pass<M> {
    type Result = M::Result;
}

/// What the world may know of a container.
#[derive(Message)]
#[rtype(result = "Result<Handle>")]
pub struct Find(pub ContainerId);

/// All containers.
#[derive(Message)]
#[rtype(result = "Vec<Handle>")]
pub struct List;

/// Ends everything: takes no further container, sends SIGTERM to all, waits, cuts off. Answers with how many were ended
/// politely and how many were cut off; they are still there to be deleted.
#[derive(Message)]
#[rtype(result = "Drained")]
pub struct Drain {
    /// The signal to begin with, as in signal(7).
    pub signal: u32,
    /// How long containers have before they are cut off.
    pub timeout: Duration,
}

/// How a [`Drain`] went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Drained {
    pub polite: usize,
    pub cut_off: usize,
}
