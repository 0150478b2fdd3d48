//! Further processes in a native container: each has a state machine of its own, and the container's actor is its only
//! writer.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use actix::{ActorFutureExt, AsyncContext, Context, Handler, ResponseActFuture, WrapFuture, fut};
use oci_spec::runtime::Process as ExecSpec;
use tokio::sync::watch;

use super::handle::{Handle, Native};
use super::messages::{AddExec, DeleteExec, ExecEnded, ExecPids, FindExec, KillExec, StartExec};
use super::native::outcome;
use super::state::{Exit, Phase, State};
use super::{Container, NEVER_RAN};
use crate::ContainerId;
use crate::error::{Error, Result};
use crate::event::EventKind;
use crate::native::{Ending, Process};
use crate::stdio::StdioPaths;

/// A name becomes part of names of files in the bundle.
const LONGEST_NAME: usize = 200;

const NO_SHELL: &str = "exec is not supported for wasm: a wasm container has no shell to execute";

/// Those of one container, by name.
#[derive(Default)]
pub(super) struct Execs(HashMap<String, Exec>);

struct Exec {
    state: State,
    phase: watch::Sender<Phase>,
    stdio: StdioPaths,
    /// Taken by the start, given back by one that failed.
    spec: Option<ExecSpec>,
    process: Option<Arc<Process>>,
}

impl Execs {
    /// Whether any is being started, or has not been told as ended.
    pub fn are_running(&self) -> bool {
        self.0.values().any(|exec| exec.state.phase() == Phase::Running)
    }

    /// The container is deleted: whoever waits for one is answered.
    pub fn forget(&mut self) {
        self.0.drain().for_each(|(_, mut exec)| exec.stop(NEVER_RAN));
    }

    fn get(&mut self, container: &ContainerId, name: &str) -> Result<&mut Exec> {
        self.0.get_mut(name).ok_or_else(|| Error::NotFound(named(container, name)))
    }
}

/// What errors call it.
fn named(container: &ContainerId, exec: &str) -> ContainerId {
    ContainerId::new(container.namespace(), &format!("{}, exec {exec}", container.id()))
}

impl Exec {
    fn new(id: ContainerId, spec: ExecSpec, stdio: StdioPaths) -> Self {
        let state = State::new(id);
        let phase = watch::Sender::new(state.phase());
        Self { state, phase, stdio, spec: Some(spec), process: None }
    }

    fn stop(&mut self, code: u32) {
        if self.state.exited(Exit { code, at: SystemTime::now() }) {
            self.phase.send_replace(self.state.phase());
        }
    }

    fn pid(&self) -> u32 {
        self.process.as_ref().map_or(0, |process| process.pid())
    }
}

impl Handler<AddExec> for Container {
    type Result = Result<()>;

    fn handle(&mut self, AddExec { exec, process, stdio }: AddExec, _: &mut Context<Self>) -> Result<()> {
        self.task(NO_SHELL)?;
        self.state.expect_executable()?;
        if exec.is_empty() || exec.len() > LONGEST_NAME || exec.contains('/') {
            return Err(Error::invalid(format!("{exec:?} cannot be the id of an exec")));
        }
        let id = named(&self.handle.id, &exec);
        if self.execs.0.contains_key(&exec) {
            return Err(Error::AlreadyExists(id));
        }
        let mut spec: ExecSpec =
            serde_json::from_slice(&process).map_err(|e| Error::invalid(format!("the process to execute: {e}")))?;
        spec.set_terminal(Some(stdio.terminal));
        self.execs.0.insert(exec.clone(), Exec::new(id, spec, stdio));
        self.events.tell(&self.handle.id, EventKind::ExecAdded { exec });
        Ok(())
    }
}

impl Handler<StartExec> for Container {
    type Result = ResponseActFuture<Self, Result<u32>>;

    fn handle(&mut self, StartExec(name): StartExec, _: &mut Context<Self>) -> Self::Result {
        let (task, spec, stdio) = match self.begin_exec(&name) {
            Ok(begun) => begun,
            Err(refused) => return Box::pin(fut::ready(Err(refused))),
        };
        let (again, id) = (spec.clone(), name.clone());
        Box::pin(async move { task.exec(&id, spec, stdio).await }.into_actor(self).map(move |process, act, ctx| {
            match process {
                Ok(process) => act.exec_runs(name, Arc::new(process), ctx),
                Err(error) => {
                    if let Ok(exec) = act.execs.get(&act.handle.id, &name) {
                        exec.state.not_started();
                        exec.spec = Some(again);
                    }
                    act.tell_ended(ctx);
                    Err(error)
                }
            }
        }))
    }
}

impl Container {
    fn begin_exec(&mut self, name: &str) -> Result<(Arc<crate::native::Task>, ExecSpec, StdioPaths)> {
        let task = self.task(NO_SHELL)?;
        let exec = self.execs.get(&self.handle.id, name)?;
        self.state.expect_executable()?;
        exec.state.start()?;
        let spec = exec.spec.take().ok_or_else(|| Error::Internal("an exec was started without its process".into()))?;
        Ok((task, spec, exec.stdio.clone()))
    }

    fn exec_runs(&mut self, name: String, process: Arc<Process>, ctx: &mut Context<Self>) -> Result<u32> {
        let pid = process.pid();
        let watch = self.task(NO_SHELL)?.watch_exec(Arc::clone(&process));
        let exec = self.execs.get(&self.handle.id, &name)?;
        exec.process = Some(process);
        exec.phase.send_replace(exec.state.phase());
        self.events.tell(&self.handle.id, EventKind::ExecStarted { exec: name.clone(), pid });
        tracing::info!(container = %self.handle.id, exec = name, pid, "exec started");
        let ended = async move { watch.await.unwrap_or(Ending::Unknown) };
        ctx.spawn(ended.into_actor(self).map(|ending, _, ctx| ctx.notify(ExecEnded { exec: name, ending })));
        Ok(pid)
    }
}

impl Handler<ExecEnded> for Container {
    type Result = ();

    fn handle(&mut self, ExecEnded { exec: name, ending }: ExecEnded, ctx: &mut Context<Self>) {
        let code = outcome(ending).code();
        if let Ok(exec) = self.execs.get(&self.handle.id, &name) {
            exec.stop(code);
            let (at, pid) = (exec.state.phase().exit().map_or_else(SystemTime::now, |exit| exit.at), exec.pid());
            tracing::info!(container = %self.handle.id, exec = name, code, "exec exited");
            self.events.tell_at(&self.handle.id, at, EventKind::ExecExited { exec: name, pid, code });
        }
        self.tell_ended(ctx);
    }
}

impl Handler<KillExec> for Container {
    type Result = Result<()>;

    fn handle(&mut self, KillExec { exec: name, signal }: KillExec, _: &mut Context<Self>) -> Result<()> {
        let exec = self.execs.get(&self.handle.id, &name)?;
        exec.state.signal(signal)?;
        match &exec.process {
            // Not reaped yet, or so it was a moment ago.
            Some(process) => process.signal(signal).map_err(|error| match error {
                Error::Host { .. } => Error::AlreadyFinished(named(&self.handle.id, &name)),
                other => other,
            }),
            None => Err(exec.state.wrong("kill")),
        }
    }
}

impl Handler<DeleteExec> for Container {
    type Result = Result<(u32, Exit)>;

    fn handle(&mut self, DeleteExec(name): DeleteExec, _: &mut Context<Self>) -> Result<(u32, Exit)> {
        let exec = self.execs.get(&self.handle.id, &name)?;
        exec.state.delete()?;
        exec.stop(NEVER_RAN);
        if let Some(process) = &exec.process {
            process.close();
        }
        let (pid, exit) = (exec.pid(), exec.state.phase().exit());
        self.execs.0.remove(&name);
        exit.map(|exit| (pid, exit)).ok_or_else(|| Error::Internal("an exec was deleted without an exit".into()))
    }
}

impl Handler<FindExec> for Container {
    type Result = Result<Handle>;

    fn handle(&mut self, FindExec(name): FindExec, _: &mut Context<Self>) -> Result<Handle> {
        let exec = self.execs.get(&self.handle.id, &name)?;
        let process = exec.process.clone();
        let stdin = process.as_ref().and_then(|process| process.stdin_keeper());
        let (pid, phase, stdio) = (exec.pid(), exec.phase.subscribe(), exec.stdio.clone());
        let native = self.handle.native.as_ref().map(|of| Native { task: Arc::clone(&of.task), process });
        Ok(Handle { pid, phase, stdio, stdin, native, ..self.handle.clone() })
    }
}

impl Handler<ExecPids> for Container {
    type Result = Result<HashMap<u32, String>>;

    fn handle(&mut self, _: ExecPids, _: &mut Context<Self>) -> Self::Result {
        let running = self.execs.0.iter().filter(|(_, exec)| exec.state.phase() == Phase::Running);
        Ok(running.map(|(name, exec)| (exec.pid(), name.clone())).collect())
    }
}
