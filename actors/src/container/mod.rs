//! One container: the only writer of its state.
//!
//! The actor is born when everything is prepared and dies with `Delete`. Its guest runs as a task on the guests' runtime;
//! what it comes to returns as a message. Status goes out through a `watch`: `State` and `Wait` read the [`Handle`] and
//! never enter a mailbox.

mod entrypoint;
mod exec;
mod handle;
mod messages;
mod native;
mod prepare;
mod program;
mod state;
mod work;

use std::sync::Arc;
use std::time::SystemTime;

use actix::{Actor, ActorContext, ActorFutureExt, AsyncContext, Context, Handler, ResponseActFuture, WrapFuture, fut};
use tokio::sync::watch;

pub use handle::{Handle, Measured, Usage};
pub use messages::{
    AddExec, Delete, DeleteExec, ExecPids, FindExec, Kill, KillExec, Pause, Resume, Start, StartExec, Update,
};
pub use prepare::{Blueprint, Prepared, Shared, prepare};
pub use state::{Exit, Phase};

use crate::ContainerId;
use crate::error::{Error, Result};
use crate::event::{EventKind, Events};
use crate::guest::{Outcome, Stage};
use crate::resources::Limits;
use crate::signals::Signals;
use exec::Execs;
use handle::Native;
use messages::Ended;
use native::Starting;
use prepare::Held;
use state::{Killed, State};
use work::Work;

/// Exit code of a container that was deleted before it ran: as if killed.
const NEVER_RAN: u32 = 137;

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
    /// Of a native container.
    starting: Starting,
    execs: Execs,
}

impl Container {
    /// A created container out of what was prepared, and what the world may know of it.
    pub fn new(id: ContainerId, blueprint: Blueprint, prepared: Prepared, stage: Arc<Stage>, events: Events) -> Self {
        let Prepared { work, pid, stdin, budget, cpu, held } = prepared;
        let state = State::new(id.clone());
        let (phase, phase_seen) = watch::channel(state.phase());
        let signals = watch::Sender::new(Signals::default());
        let handle = Handle {
            id,
            bundle: blueprint.bundle,
            stdio: blueprint.stdio,
            pid,
            phase: phase_seen,
            stdin,
            budget,
            cpu,
            native: match &work {
                Work::Native(task) => Some(Native { task: Arc::clone(task), process: Some(Arc::clone(task.init())) }),
                Work::Command(_) | Work::Server(..) | Work::Sandbox => None,
            },
        };
        let (work, held) = (Some(work), Some(held));
        let (starting, execs) = (Starting::default(), Execs::default());
        Self { handle, state, phase, signals, work, held, stage, events, starting, execs }
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

    /// A process can end before its program was started.
    fn started(&mut self, ctx: &mut Context<Self>) {
        if let Some(native) = &self.handle.native {
            ctx.spawn(
                native::ended(native.task.watch()).into_actor(self).map(|outcome, _, ctx| ctx.notify(Ended(outcome))),
            );
        }
    }
}

impl Container {
    fn start_guest(&mut self, ctx: &mut Context<Self>) -> Result<()> {
        let work = self.work.take().ok_or_else(|| Error::Internal("a container was started without its work".into()));
        let guest = match work.and_then(|work| work.begin(&self.stage, self.signals.subscribe())) {
            Ok(guest) => guest,
            Err(error) => {
                self.state.not_started();
                return Err(error);
            }
        };
        self.runs();
        // The guest's task has an owner that awaits it: this future, which lives as long as the actor.
        let ended = async move { guest.await.unwrap_or_else(|error| Outcome::HostFailed(panic_text(error))) };
        ctx.spawn(ended.into_actor(self).map(|outcome, _, ctx| ctx.notify(Ended(outcome))));
        Ok(())
    }

    fn runs(&self) {
        self.events.tell(&self.handle.id, EventKind::Started { pid: self.handle.pid });
        self.phase.send_replace(self.state.phase());
        tracing::info!(container = %self.handle.id, "started");
    }
}

impl Handler<Start> for Container {
    type Result = ResponseActFuture<Self, Result<()>>;

    fn handle(&mut self, _: Start, ctx: &mut Context<Self>) -> Self::Result {
        if let Err(refused) = self.state.start() {
            return Box::pin(fut::ready(Err(refused)));
        }
        match self.work.take() {
            Some(Work::Native(task)) => self.start_native(task),
            work => {
                self.work = work;
                Box::pin(fut::ready(self.start_guest(ctx)))
            }
        }
    }
}

impl Handler<Kill> for Container {
    type Result = ();

    fn handle(&mut self, kill: Kill, ctx: &mut Context<Self>) {
        if let Some(native) = &self.handle.native {
            let task = Arc::clone(&native.task);
            return self.kill_native(task, kill, ctx);
        }
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
        let Some(outcome) = self.due(outcome) else { return };
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
        self.execs.forget();
        let (held, native) = (self.held.take(), self.handle.native.clone());
        let release = async move {
            if let Some(native) = native {
                native.task.delete().await;
            }
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
