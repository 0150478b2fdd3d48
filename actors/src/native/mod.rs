//! Native containers: Linux programs beside the wasm ones of a pod, run by runc.
//!
//! ```text
//!   container::Container ──owns──▶ Task ──▶ runc (a process for each command, with a deadline)
//!     the one state machine         │
//!                                   ├─▶ Process: init     pidfd, streams, terminal
//!                                   └─▶ Process: execs
//! ```
//! runc does what the spec says; here is what its own shim does around it: it keeps the streams, waits for the processes,
//! reads the cgroup. Invariants: nothing here runs on an actor's thread but what returns at once; a task's processes are
//! children of this process, each waited for by its own number; a lost process of ours leaves enough in the bundle
//! (`runc.json`) for [`clean_up`] to end what it has started.
//!
//! Called by `container` alone; the verb `delete` calls [`clean_up`].

mod cgroup;
mod children;
mod cleanup;
mod detect;
mod io;
mod oom;
mod process;
mod runc;
mod spec;

use std::path::PathBuf;
use std::sync::Arc;

use ::runc::options::{CreateOpts, DeleteOpts, ExecOpts, KillOpts};
use oci_spec::runtime::{LinuxResources, Process as ExecSpec};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use cgroup::{DeviceLine, Stats};
pub use children::Ending;
use children::Expecting;
pub use cleanup::clean_up;
pub use detect::is_native;
pub use process::Process;
use runc::Call;
pub use runc::keep_descriptor_limit;

use crate::ContainerId;
use crate::config::RuncOptions;
use crate::error::{Error, Result};
use crate::event::Events;
use crate::stdio::StdioPaths;
use cgroup::Cgroup;
use children::Children;
use io::Wiring;
use spec::{Pids, Spec};

const SIGKILL: u32 = 9;

/// What all native containers of the process share.
#[derive(Debug, Default)]
pub struct Common(Arc<Children>);

/// What a native container is made of.
#[derive(Debug)]
pub struct Order {
    pub id: ContainerId,
    pub bundle: PathBuf,
    pub stdio: StdioPaths,
    pub options: RuncOptions,
    /// Drives streams and waits.
    pub runtime: Handle,
    pub events: Events,
}

/// A container that runc knows.
#[derive(Debug)]
pub struct Task {
    bundle: PathBuf,
    call: Arc<Call>,
    init: Arc<Process>,
    cgroup: Cgroup,
    pids: Pids,
    oom: Arc<oom::Watch>,
    children: Arc<Children>,
    runtime: Handle,
    /// One command that changes the container at a time.
    turn: tokio::sync::Mutex<()>,
    closing: CancellationToken,
}

/// What exists before its cgroup is known.
struct Made {
    call: Arc<Call>,
    init: Process,
    pids: Pids,
}

impl Task {
    /// Creates the container. Its process exists then, and waits for the start.
    ///
    /// # Errors
    /// `Program` without runc, `Host` with what runc says; nothing is left behind.
    pub async fn create(order: Order, common: &Common) -> Result<Self> {
        let Order { id, bundle, stdio, options, runtime, events } = order;
        let children = Arc::clone(&common.0);
        let expecting = children.expect(&runtime)?;
        let (name, folder) = (id.clone(), bundle.clone());
        let making = runtime.spawn_blocking(move || {
            // Held to the end, so that the process is known before orphans are looked for.
            let expecting = expecting;
            make(&name, &folder, &stdio, &options, &expecting)
        });
        let made = making.await.map_err(|e| Error::Internal(format!("creating the container: {e}")))??;
        let Made { call, init, pids } = made;
        let cgroup = match Cgroup::of(init.pid()) {
            Ok(cgroup) => cgroup,
            Err(error) => {
                remove(&runtime, &call).await;
                return Err(error);
            }
        };
        let closing = init.closing().clone();
        let oom = {
            let _inside = runtime.enter();
            oom::Watch::begin(id, cgroup.clone(), events, closing.child_token())
        };
        let turn = tokio::sync::Mutex::default();
        Ok(Self { bundle, call, init: Arc::new(init), cgroup, pids, oom, children, runtime, turn, closing })
    }

    /// The container's first process.
    pub fn init(&self) -> &Arc<Process> {
        &self.init
    }

    /// Runs its program.
    ///
    /// # Errors
    /// `Host` with what runc says.
    pub async fn start(&self) -> Result<()> {
        let _turn = self.turn.lock().await;
        self.init.copy(&self.runtime)?;
        runc::call(&self.runtime, &self.call, "OCI runtime start failed", |runc, id| runc.start(id).map(drop)).await
    }

    /// Waits for the end of the container on threads that are for it; its output is complete then. Once.
    pub fn watch(self: &Arc<Self>) -> JoinHandle<Ending> {
        let task = Arc::clone(self);
        self.runtime.spawn(async move { task.ended().await })
    }

    /// The same for a process that was executed in it.
    pub fn watch_exec(&self, process: Arc<Process>) -> JoinHandle<Ending> {
        self.runtime.spawn(async move {
            let ending = process.ended().await;
            process.complete().await;
            ending
        })
    }

    async fn ended(&self) -> Ending {
        let ending = self.init.ended().await;
        if self.pids == Pids::Shared {
            // Nobody else would end them, and they hold the streams.
            self.kill_all(SIGKILL).await.unwrap_or_else(|error| tracing::debug!(%error, "nothing was left to kill"));
        }
        self.oom.look();
        self.init.complete().await;
        ending
    }

    /// Signals the first process, or all. `frozen`: only runc can thaw it first.
    ///
    /// # Errors
    /// `Host` with what the kernel or runc says.
    pub async fn kill(&self, signal: u32, all: bool, frozen: bool) -> Result<()> {
        if all || (frozen && signal == SIGKILL) {
            let killed = if all { self.kill_all(signal).await } else { self.kill_by_runc(signal).await };
            // Whatever is wrong with runc, a process can be ended.
            return if signal == SIGKILL { self.init.signal(signal).or(killed) } else { killed };
        }
        self.init.signal(signal)
    }

    async fn kill_all(&self, signal: u32) -> Result<()> {
        let all = KillOpts::new().all(true);
        runc::call(&self.runtime, &self.call, "kill all", move |runc, id| runc.kill(id, signal, Some(&all))).await
    }

    async fn kill_by_runc(&self, signal: u32) -> Result<()> {
        runc::call(&self.runtime, &self.call, "kill", move |runc, id| runc.kill(id, signal, None)).await
    }

    /// Stops all its processes where they are.
    ///
    /// # Errors
    /// `Host` with what runc says.
    pub async fn pause(&self) -> Result<()> {
        let _turn = self.turn.lock().await;
        runc::call(&self.runtime, &self.call, "OCI runtime pause failed", |runc, id| runc.pause(id)).await
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// `Host` with what runc says.
    pub async fn resume(&self) -> Result<()> {
        let _turn = self.turn.lock().await;
        runc::call(&self.runtime, &self.call, "OCI runtime resume failed", |runc, id| runc.resume(id)).await
    }

    /// Changes its limits; `resources` is JSON as in the spec.
    ///
    /// # Errors
    /// `Invalid` when it is not, `Host` with what runc says.
    pub async fn update(&self, resources: &[u8]) -> Result<()> {
        let resources: LinuxResources =
            serde_json::from_slice(resources).map_err(|e| Error::invalid(format!("the resources: {e}")))?;
        let _turn = self.turn.lock().await;
        let what = "OCI runtime update failed";
        runc::call(&self.runtime, &self.call, what, move |runc, id| runc.update(id, &resources)).await
    }

    /// The numbers of all its processes.
    ///
    /// # Errors
    /// `Host` with what runc says.
    pub async fn processes(&self) -> Result<Vec<u32>> {
        let found = runc::call(&self.runtime, &self.call, "OCI runtime ps failed", |runc, id| runc.ps(id)).await?;
        Ok(found.into_iter().filter_map(|pid| u32::try_from(pid).ok()).collect())
    }

    /// What its cgroup says.
    ///
    /// # Errors
    /// `Internal` only.
    pub async fn stats(&self) -> Result<Stats> {
        let cgroup = self.cgroup.clone();
        let read = self.runtime.spawn_blocking(move || cgroup.stats()).await;
        read.map_err(|e| Error::Internal(format!("reading the cgroup: {e}")))
    }

    /// Runs a further program in the container; `name` is its id there.
    ///
    /// # Errors
    /// `Host` with what runc says.
    pub async fn exec(&self, name: &str, spec: ExecSpec, stdio: StdioPaths) -> Result<Process> {
        let _turn = self.turn.lock().await;
        let expecting = self.children.expect(&self.runtime)?;
        let (call, bundle, name) = (Arc::clone(&self.call), self.bundle.clone(), format!("exec-{name}"));
        let (runtime, closing) = (self.runtime.clone(), self.closing.child_token());
        let running = self.runtime.spawn_blocking(move || {
            let wiring = Wiring::make(&bundle, &name, &stdio)?;
            let (pid_file, log) = (bundle.join(format!("{name}.pid")), bundle.join(format!("{name}.log")));
            let options = ExecOpts {
                io: wiring.io(),
                pid_file: Some(pid_file.clone()),
                console_socket: wiring.console_socket(),
                detach: true,
            };
            runc::call_logged(&call, "OCI runtime exec failed", &log, |runc, id| runc.exec(id, &spec, Some(&options)))?;
            drop(options);
            let child = expecting.adopt(process::read_pid(&pid_file)?)?;
            // Read; the name may be used again.
            let _ = std::fs::remove_file(pid_file);
            let process = Process::new(child, wiring.connect(), closing)?;
            process.copy(&runtime)?;
            Ok(process)
        });
        running.await.map_err(|e| Error::Internal(format!("exec: {e}")))?
    }

    /// Lets go of everything, ending what still runs.
    pub async fn delete(&self) {
        let _turn = self.turn.lock().await;
        remove(&self.runtime, &self.call).await;
        self.closing.cancel();
    }
}

/// What is left of a container whose process is gone belongs to runc.
async fn remove(runtime: &Handle, call: &Arc<Call>) {
    let forced = DeleteOpts::new().force(true);
    let deleted =
        runc::call(runtime, call, "OCI runtime delete failed", move |runc, id| runc.delete(id, Some(&forced)));
    if let Err(error) = deleted.await {
        tracing::error!(%error, ?call, "something of a native container is left");
    }
}

/// The blocking part of a create.
fn make(
    id: &ContainerId,
    bundle: &std::path::Path,
    stdio: &StdioPaths,
    options: &RuncOptions,
    expecting: &Expecting,
) -> Result<Made> {
    let spec = Spec::read(bundle)?;
    let pids = spec.pids(bundle)?;
    let stdio = StdioPaths { terminal: stdio.terminal || spec.terminal(), ..stdio.clone() };
    let wiring = Wiring::make(bundle, "init", &stdio)?;
    let call = Arc::new(Call::new(bundle, id.namespace(), id.id(), options, spec.is_systemd_cgroup()));
    call.write(bundle)?;
    let (pid_file, log) = (bundle.join("init.pid"), bundle.join("log.json"));
    let create = CreateOpts {
        io: wiring.io(),
        pid_file: Some(pid_file.clone()),
        console_socket: wiring.console_socket(),
        no_pivot: options.no_pivot_root,
        no_new_keyring: options.no_new_keyring,
        ..CreateOpts::default()
    };
    let created = runc::call_logged(&call, "OCI runtime create failed", &log, |runc, id| {
        runc.create(id, bundle, Some(&create)).map(drop)
    });
    drop(create);
    let made = created.and_then(|()| {
        let child = expecting.adopt(process::read_pid(&pid_file)?)?;
        Process::new(child, wiring.connect(), CancellationToken::new())
    });
    match made {
        Ok(init) => Ok(Made { call, init, pids }),
        Err(error) => {
            cleanup::remove(&call);
            Err(error)
        }
    }
}
