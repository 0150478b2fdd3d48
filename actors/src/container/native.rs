//! The verbs of a native container: what runc takes time for runs as a future of the actor, which stays free meanwhile.

use std::sync::Arc;

use actix::{ActorFutureExt, AsyncContext, Context, Handler, ResponseActFuture, WrapFuture, fut};
use tokio::task::JoinHandle;

use super::messages::{Ended, Kill, Pause, Resume};
use super::state::Phase;
use super::work::Work;
use super::{Container, panic_text};
use crate::error::{Error, Result};
use crate::event::EventKind;
use crate::guest::Outcome;
use crate::native::{Ending, Task};

/// What the end of the first process has to wait for: containerd expects start < exit, and the exits of execs before.
#[derive(Debug, Default)]
pub(super) struct Starting {
    /// runc is about to start it.
    under_way: bool,
    /// It has ended already.
    ended: Option<Outcome>,
}

/// What a process came to, once it is over.
pub(super) async fn ended(watch: JoinHandle<Ending>) -> Outcome {
    watch.await.map_or_else(|error| Outcome::HostFailed(panic_text(error)), outcome)
}

pub(super) fn outcome(ending: Ending) -> Outcome {
    match ending {
        Ending::Exited(code) => Outcome::Exited(code),
        Ending::Killed(signal) => Outcome::Killed(signal),
        Ending::Unknown => Outcome::HostFailed("somebody else took the status of its process".into()),
    }
}

impl Container {
    pub(super) fn start_native(&mut self, task: Arc<Task>) -> ResponseActFuture<Self, Result<()>> {
        self.starting.under_way = true;
        let again = Arc::clone(&task);
        Box::pin(async move { task.start().await }.into_actor(self).map(|started, act, ctx| {
            act.starting.under_way = false;
            match &started {
                Ok(()) => act.runs(),
                Err(_) => {
                    act.state.not_started();
                    act.work = Some(Work::Native(again));
                }
            }
            act.tell_ended(ctx);
            started
        }))
    }

    /// The outcome if it can be told now; else it is kept.
    pub(super) fn due(&mut self, outcome: Outcome) -> Option<Outcome> {
        if self.starting.under_way || self.execs.are_running() {
            self.starting.ended = Some(outcome);
            return None;
        }
        Some(outcome)
    }

    /// Something that the end may have waited for has happened.
    pub(super) fn tell_ended(&mut self, ctx: &mut Context<Self>) {
        if let Some(outcome) = self.starting.ended.take() {
            ctx.notify(Ended(outcome));
        }
    }

    pub(super) fn kill_native(&mut self, task: Arc<Task>, kill: Kill, ctx: &mut Context<Self>) {
        let Kill { signal, all, reply } = kill;
        let fits = self.state.signal(signal);
        let (frozen, id) = (self.state.phase() == Phase::Paused, self.handle.id.clone());
        let killed = async move {
            let result = match fits {
                Ok(()) => task.kill(signal, all, frozen).await.map_err(|error| finished(error, &id)),
                Err(refused) => Err(refused),
            };
            if let Err(error) = reply.send(result) {
                tracing::debug!(container = %id, ?error, "nobody waits for the answer to a kill");
            }
        };
        ctx.spawn(killed.into_actor(self));
    }

    /// The task, for a verb that needs one.
    pub(super) fn task(&self, sentence: &str) -> Result<Arc<Task>> {
        let native = self.handle.native.as_ref().ok_or_else(|| Error::Unsupported(sentence.to_owned()))?;
        Ok(Arc::clone(&native.task))
    }
}

/// The process may have ended a moment ago.
fn finished(error: Error, id: &crate::ContainerId) -> Error {
    match error {
        Error::Host { source, .. } if source.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {
            Error::AlreadyFinished(id.clone())
        }
        other => other,
    }
}

impl Handler<Pause> for Container {
    type Result = ResponseActFuture<Self, Result<()>>;

    fn handle(&mut self, _: Pause, _: &mut Context<Self>) -> Self::Result {
        let ready = self.task("pause is not supported yet").and_then(|task| {
            self.state.expect_running("pause")?;
            Ok(task)
        });
        let task = match ready {
            Ok(task) => task,
            Err(refused) => return Box::pin(fut::ready(Err(refused))),
        };
        Box::pin(async move { task.pause().await }.into_actor(self).map(|done, act, _| {
            if done.is_ok() && act.state.paused() {
                act.changed(EventKind::Paused);
            }
            done
        }))
    }
}

impl Handler<Resume> for Container {
    type Result = ResponseActFuture<Self, Result<()>>;

    fn handle(&mut self, _: Resume, _: &mut Context<Self>) -> Self::Result {
        let ready = self.task("resume is not supported yet: no container can be paused").and_then(|task| {
            self.state.expect_paused()?;
            Ok(task)
        });
        let task = match ready {
            Ok(task) => task,
            Err(refused) => return Box::pin(fut::ready(Err(refused))),
        };
        Box::pin(async move { task.resume().await }.into_actor(self).map(|done, act, _| {
            if done.is_ok() && act.state.resumed() {
                act.changed(EventKind::Resumed);
            }
            done
        }))
    }
}

impl Container {
    fn changed(&self, kind: EventKind) {
        tracing::info!(container = %self.handle.id, ?kind, "changed");
        self.events.tell(&self.handle.id, kind);
        self.phase.send_replace(self.state.phase());
    }
}
