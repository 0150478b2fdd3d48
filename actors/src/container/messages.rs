//! What a container can be told. Sent by the supervisor only.

use std::collections::HashMap;

use actix::Message;
use oci_spec::runtime::LinuxResources;
use tokio::sync::oneshot;

use super::Handle;
use super::state::Exit;
use crate::error::Result;
use crate::guest::Outcome;
use crate::native::Ending;
use crate::stdio::StdioPaths;

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
    /// Not its first process only; a guest is one anyway.
    pub all: bool,
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

/// Stops all processes where they are. Native containers only, as all that follows.
#[derive(Message)]
#[rtype(result = "Result<()>")]
pub struct Pause;

/// Lets them go on.
#[derive(Message)]
#[rtype(result = "Result<()>")]
pub struct Resume;

/// Announces a further process of this name.
#[derive(Message)]
#[rtype(result = "Result<()>")]
pub struct AddExec {
    pub exec: String,
    /// The `process` of a spec, as JSON.
    pub process: Vec<u8>,
    pub stdio: StdioPaths,
}

/// Runs it; answers with its pid.
#[derive(Message)]
#[rtype(result = "Result<u32>")]
pub struct StartExec(pub String);

/// Signals it.
#[derive(Message)]
#[rtype(result = "Result<()>")]
pub struct KillExec {
    pub exec: String,
    pub signal: u32,
}

/// Forgets it; answers with its pid and exit.
#[derive(Message)]
#[rtype(result = "Result<(u32, Exit)>")]
pub struct DeleteExec(pub String);

/// What the world may know of it.
#[derive(Message)]
#[rtype(result = "Result<Handle>")]
pub struct FindExec(pub String);

/// Which processes are execs, by their numbers.
#[derive(Message)]
#[rtype(result = "Result<HashMap<u32, String>>")]
pub struct ExecPids;

/// It is over.
#[derive(Message)]
#[rtype(result = "()")]
pub(super) struct ExecEnded {
    pub exec: String,
    pub ending: Ending,
}
