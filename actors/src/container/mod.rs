//! One container: the only writer of its state.
//!
//! The actor is born when everything is prepared and dies with `Delete`. Its guest runs as a task on the guests' runtime;
//! what it comes to returns as a message. Status goes out through a `watch`: `State` and `Wait` read the [`Handle`] and
//! never enter a mailbox.

mod entrypoint;
mod messages;
mod prepare;
mod program;
mod state;
mod work;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use actix::{Actor, ActorContext, ActorFutureExt, AsyncContext, Context, Handler, ResponseActFuture, WrapFuture};
use tokio::sync::watch;

pub use messages::{Delete, Kill, Start, Update};
pub use prepare::{Blueprint, Prepared, prepare};
pub use state::{Exit, Phase};

use crate::ContainerId;
use crate::error::{Error, Result};
use crate::event::{EventKind, Events};
use crate::guest::{Budget, CpuTime, Outcome, Stage, Throttled};
use crate::resources::Limits;
use crate::signals::Signals;
use crate::stdio::{Keeper, StdioPaths};
use messages::Ended;
use prepare::Held;
use state::{Killed, State};
use work::Work;

/// Exit code of a container that was deleted before it ran: as if killed.
const NEVER_RAN: u32 = 137;

/// What everybody may know of a container, without asking its actor.
#[derive(Clone)]
pub struct Handle {
    pub id: ContainerId,
    pub bundle: PathBuf,
    pub stdio: StdioPaths,
    /// The anchor thread's id.
    pub pid: u32,
    phase: watch::Receiver<Phase>,
    stdin: Option<Keeper>,
    budget: Arc<Budget>,
    cpu: Arc<CpuTime>,
}

/// What a container uses.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// CPU time of its guest.
    pub cpu: std::time::Duration,
    /// Memory its guest reserved, in bytes: now, at most, and its limit.
    pub memory: u64,
    pub memory_peak: u64,
    pub memory_limit: Option<u64>,
    /// Whether it was ended for wanting more.
    pub out_of_memory: bool,
    /// What its CPU quota has done.
    pub throttled: Throttled,
}

impl Handle {
    /// Where the container is.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Waits for the exit; answers at once for an exited container, also for a deleted one.
    ///
    /// # Errors
    /// `Internal` when the container's actor died without an exit.
    pub async fn wait(&mut self) -> Result<Exit> {
        let stopped = self.phase.wait_for(|phase| phase.exit().is_some()).await;
        let exit = stopped.ok().and_then(|phase| phase.exit());
        exit.ok_or_else(|| Error::Internal(format!("container {} ended without an exit", self.id)))
    }

    /// Ends the guest's stdin once its client has closed it as well.
    pub fn close_stdin(&self) {
        if let Some(stdin) = &self.stdin {
            stdin.close();
        }
    }

    /// What it uses now.
    pub fn usage(&self) -> Usage {
        Usage {
            cpu: self.cpu.total(),
            memory: self.budget.used(),
            memory_peak: self.budget.peak(),
            memory_limit: self.budget.limit(),
            out_of_memory: self.budget.exceeded(),
            throttled: self.cpu.throttled(),
        }
    }
}

/// The actor.
pub struct Container {
    handle: Handle,
    state: State,
    phase: watch::Sender<Phase>,
    signals: watch::Sender<Signals>,
    /// Taken by the start.
    work: Option<Work>,
    held: Option<Held>,
    stage: Arc<Stage>,
    events: Events,
}

impl Container {
    /// A created container out of what was prepared, and what the world may know of it.
    pub fn new(id: ContainerId, blueprint: Blueprint, prepared: Prepared, stage: Arc<Stage>, events: Events) -> Self {
        let Prepared { work, stdin, budget, cpu, held } = prepared;
        let state = State::new(id.clone());
        let (phase, phase_seen) = watch::channel(state.phase());
        let signals = watch::Sender::new(Signals::default());
        let handle = Handle {
            id,
            bundle: blueprint.bundle,
            stdio: blueprint.stdio,
            pid: held.pod.tid(),
            phase: phase_seen,
            stdin,
            budget,
            cpu,
        };
        Self { handle, state, phase, signals, work: Some(work), held: Some(held), stage, events }
    }

    /// What the world may know of it.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    fn stopped(&mut self, code: u32) {
        let exit = Exit { code, at: SystemTime::now() };
        if !self.state.exited(exit) {
            return;
        }
        tracing::info!(container = %self.handle.id, code, "exited");
        self.events.tell_at(&self.handle.id, exit.at, EventKind::Exited { pid: self.handle.pid, code });
        self.phase.send_replace(self.state.phase());
    }
}

impl Actor for Container {
    type Context = Context<Self>;
}

impl Handler<Start> for Container {
    type Result = Result<()>;

    fn handle(&mut self, _: Start, ctx: &mut Context<Self>) -> Result<()> {
        self.state.start()?;
        let work = self.work.take().ok_or_else(|| Error::Internal("a container was started without its work".into()));
        let guest = match work.and_then(|work| work.begin(&self.stage, self.signals.subscribe())) {
            Ok(guest) => guest,
            Err(error) => {
                self.state.not_started();
                return Err(error);
            }
        };
        self.events.tell(&self.handle.id, EventKind::Started { pid: self.handle.pid });
        self.phase.send_replace(self.state.phase());
        tracing::info!(container = %self.handle.id, "started");
        // The guest's task has an owner that awaits it: this future, which lives as long as the actor.
        let ended = async move { guest.await.unwrap_or_else(|error| Outcome::HostFailed(panic_text(error))) };
        ctx.spawn(ended.into_actor(self).map(|outcome, _, ctx| ctx.notify(Ended(outcome))));
        Ok(())
    }
}

impl Handler<Kill> for Container {
    type Result = ();

    fn handle(&mut self, kill: Kill, _: &mut Context<Self>) {
        let result = self.state.kill(kill.signal).map(|killed| match killed {
            Killed::Nothing => {}
            Killed::Unstarted(code) => {
                self.work = None;
                self.stopped(code);
            }
            Killed::Interrupt(signal) => self.signals.send_modify(|signals| signals.add(signal)),
        });
        if let Err(error) = kill.reply.send(result) {
            tracing::debug!(container = %self.handle.id, ?error, "nobody waits for the answer to a kill");
        }
    }
}

impl Handler<Update> for Container {
    type Result = Result<()>;

    fn handle(&mut self, Update(resources): Update, _: &mut Context<Self>) -> Result<()> {
        self.state.update()?;
        let Handle { id, budget, cpu, .. } = &self.handle;
        let before = Limits { memory: budget.limit(), cpu: cpu.quota() };
        let limits = before.updated(&resources)?;
        budget.set_limit(limits.memory).map_err(|used| {
            let limit = limits.memory.unwrap_or(u64::MAX);
            let why = format!("linux.resources.memory.limit: {limit} bytes are less than the {used} that it uses");
            Error::invalid(format!("container {id}: {why}"))
        })?;
        if limits.cpu != before.cpu {
            cpu.limit(limits.cpu);
        }
        tracing::info!(container = %id, ?limits, "updated");
        Ok(())
    }
}

impl Handler<Ended> for Container {
    type Result = ();

    fn handle(&mut self, Ended(outcome): Ended, _: &mut Context<Self>) {
        match &outcome {
            Outcome::OutOfMemory(why) => {
                tracing::warn!(container = %self.handle.id, why, "out of memory");
                self.events.tell(&self.handle.id, EventKind::OutOfMemory);
            }
            Outcome::HostFailed(why) => tracing::error!(container = %self.handle.id, why, "the host failed a guest"),
            Outcome::Trapped(why) => {
                let cause = why.lines().next_back().unwrap_or_default().trim();
                tracing::warn!(container = %self.handle.id, cause, "trapped");
            }
            Outcome::Exited(_) | Outcome::RunFailed | Outcome::Killed(_) => {}
        }
        self.stopped(outcome.code());
    }
}

impl Handler<Delete> for Container {
    type Result = ResponseActFuture<Self, Result<Exit>>;

    fn handle(&mut self, _: Delete, _: &mut Context<Self>) -> Self::Result {
        if let Err(error) = self.state.delete() {
            return Box::pin(actix::fut::ready(Err(error)));
        }
        self.work = None;
        self.stopped(NEVER_RAN);
        let held = self.held.take();
        let release = async move {
            if let Some(held) = held {
                held.release().await;
            }
        };
        Box::pin(release.into_actor(self).map(|(), act, ctx| {
            ctx.stop();
            act.state.phase().exit().ok_or_else(|| Error::Internal("a container was deleted without an exit".into()))
        }))
    }
}

fn panic_text(error: tokio::task::JoinError) -> String {
    let Ok(payload) = error.try_into_panic() else { return "its task was cancelled".into() };
    let text = payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied());
    format!("a panic in a host function: {}", text.unwrap_or("(no text)"))
}
