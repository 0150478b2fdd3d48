//! One run of a program, from its start to its outcome.

use std::sync::Arc;

use tokio::sync::watch;
use wasmtime::component::InstancePre;
use wasmtime::{AsContextMut, Engine, Store};

use super::epoch::Ticker;
use super::exit::{Outcome, RunFailed};
use super::limits::Budget;
use super::program::{Command, Entry, Program};
use super::quota::CpuTime;
use super::store::{Environment, Guest, store};
use crate::signals::Signals;
use crate::stdio::{Stdio, Streams};

/// Everything a run needs.
pub struct Run {
    pub program: Arc<Program>,
    pub entry: Entry,
    pub environment: Environment,
    pub stdio: Stdio,
    pub budget: Arc<Budget>,
    pub cpu: Arc<CpuTime>,
}

impl Run {
    /// Runs the guest to its end. Its store is gone and its output complete when this returns; dropped earlier, both are
    /// cut off.
    /// The first of `signals` ends it.
    pub async fn drive(self, ticker: &Ticker, signals: watch::Receiver<Signals>) -> Outcome {
        let Self { program, entry, environment, stdio, budget, cpu } = self;
        let streams = match stdio.attach() {
            Ok(streams) => streams,
            Err(error) => return Outcome::HostFailed(format!("attach the standard streams: {error}")),
        };
        let user = environment.user.clone();
        let (theirs, environment) = (streams.clone(), Arc::new(environment));
        let call = async move { call(&program, &entry, environment, &theirs, &budget).await };
        let call = ticker.driver(cpu, user).drive(call);
        let outcome = tokio::select! {
            biased;
            number = killed(signals.clone()) => Outcome::Killed(number),
            outcome = call => outcome,
        };
        if let Some(note) = outcome.note() {
            streams.stderr.note(&format!("{}\n", bounded(note)));
        }
        // A reader that stalls holds up the end of its own container only, and a signal ends the wait.
        tokio::select! {
            biased;
            () = streams.finish() => {}
            _ = killed(signals) => {}
        }
        outcome
    }
}

/// Waits for the signal that ends the guest.
async fn killed(mut signals: watch::Receiver<Signals>) -> u8 {
    match signals.wait_for(|signals| signals.count > 0).await {
        Ok(signals) => signals.first,
        // The owner is gone without a word: the process is being torn down.
        Err(_) => rustix::process::Signal::KILL.as_raw().unsigned_abs() as u8,
    }
}

async fn call(
    program: &Program,
    entry: &Entry,
    environment: Arc<Environment>,
    streams: &Streams,
    budget: &Arc<Budget>,
) -> Outcome {
    let mut store = match store(program.engine(), environment, streams, budget) {
        Ok(store) => store,
        Err(error) => return Outcome::HostFailed(error.to_string()),
    };
    let result = match (program, entry) {
        (Program::Module(pre), Entry::Export { name, returns_code }) => {
            module(&mut store, pre, name, *returns_code).await
        }
        (Program::Component { command: Some(Command::P2(pre)), .. }, Entry::Run) => command(&mut store, pre).await,
        (Program::Component { command: Some(Command::P3(pre)), .. }, Entry::Run) => concurrent(&mut store, pre).await,
        (Program::Component { pre, .. }, Entry::Function { index, returns_result }) => {
            function(&mut store, pre, *index, *returns_result).await
        }
        (Program::Module(_) | Program::Component { .. } | Program::Server(_), _) => {
            return Outcome::HostFailed("the entry point belongs to another kind of program".into());
        }
    };
    Outcome::of(result)
}

async fn module(
    store: &mut Store<Guest>,
    pre: &wasmtime::InstancePre<Guest>,
    name: &str,
    returns_code: bool,
) -> wasmtime::Result<()> {
    let instance = pre.instantiate_async(store.as_context_mut()).await?;
    // A reactor is initialised before any other export of it is called (WASI application ABI).
    if name != "_start"
        && let Some(initialize) = instance.get_func(store.as_context_mut(), "_initialize")
    {
        initialize.typed::<(), ()>(store.as_context_mut())?.call_async(store.as_context_mut(), ()).await?;
    }
    if !returns_code {
        let entry = instance.get_typed_func::<(), ()>(store.as_context_mut(), name)?;
        return entry.call_async(store, ()).await;
    }
    let entry = instance.get_typed_func::<(), u32>(store.as_context_mut(), name)?;
    match entry.call_async(store, ()).await? {
        0 => Ok(()),
        code => Err(super::exit::ProcExit(code).into()),
    }
}

async fn command(
    store: &mut Store<Guest>,
    pre: &wasmtime_wasi::p2::bindings::CommandPre<Guest>,
) -> wasmtime::Result<()> {
    let command = pre.instantiate_async(store.as_context_mut()).await?;
    command.wasi_cli_run().call_run(store).await?.map_err(|()| RunFailed.into())
}

/// `wasi:cli/run` of WASI 0.3, which may run tasks beside itself; they end with it.
async fn concurrent(
    store: &mut Store<Guest>,
    pre: &wasmtime_wasi::p3::bindings::CommandPre<Guest>,
) -> wasmtime::Result<()> {
    let command = pre.instantiate_async(store.as_context_mut()).await?;
    let run = store.run_concurrent(async |accessor| command.wasi_cli_run().call_run(accessor).await).await;
    run.flatten()?.map_err(|()| RunFailed.into())
}

async fn function(
    store: &mut Store<Guest>,
    pre: &InstancePre<Guest>,
    index: wasmtime::component::ComponentExportIndex,
    returns_result: bool,
) -> wasmtime::Result<()> {
    let instance = pre.instantiate_async(store.as_context_mut()).await?;
    if returns_result {
        let entry = instance.get_typed_func::<(), (Result<(), ()>,)>(store.as_context_mut(), index)?;
        let (result,) = entry.call_async(store, ()).await?;
        return result.map_err(|()| RunFailed.into());
    }
    instance.get_typed_func::<(), ()>(store.as_context_mut(), index)?.call_async(store, ()).await
}

impl Program {
    fn engine(&self) -> &Engine {
        match self {
            Self::Module(pre) => pre.module().engine(),
            Self::Component { pre, .. } => pre.engine(),
            Self::Server(server) => server.engine(),
        }
    }
}

/// Notes go to the container's log: a few kilobytes of a backtrace help, a megabyte does not.
fn bounded(note: &str) -> &str {
    let end = note.len().min(4096);
    &note[..(0..=end).rev().find(|end| note.is_char_boundary(*end)).unwrap_or(0)]
}
