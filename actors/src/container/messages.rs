//! What a container can be told. Sent by the supervisor only.

use actix::Message;
use oci_spec::runtime::LinuxResources;
use tokio::sync::oneshot;

use super::state::Exit;
use crate::error::Result;
use crate::guest::Outcome;

/// Runs the guest.
#[derive(Message)]
#[rtype(result = "Result<()>")]
pub struct Start;

/// Sends a signal. Carries its own reply, so that a caller who gives up does not take the signal back.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Kill {
    /// Number of the signal, as in signal(7).
    pub signal: u32,
    pub reply: oneshot::Sender<Result<()>>,
}

/// Changes the limits of the container.
#[derive(Message)]
#[rtype(result = "Result<()>")]
pub struct Update(pub Box<LinuxResources>);

/// Lets go of everything and ends the actor. One that never ran exits first (137), so that whoever waits hears of it.
#[derive(Message)]
#[rtype(result = "Result<Exit>")]
pub struct Delete;

/// The guest's task is over.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct Ended(pub Outcome);
