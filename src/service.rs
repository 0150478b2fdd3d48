//! The daemon: configure, wire, serve, leave.
//!
//! ```text
//! main thread    actix system: ttrpc server, supervisor, containers, events, signals      (control)
//! guest threads  tokio, two a core and more: guests, their streams                        (data)
//! epoch thread   ticks while a guest runs;  anchor threads: one a container, parked
//! blocking       mounts, files, loading: they come and go, one stays
//! ```
//! Control has a thread of its own, so that no guest, whatever it does, delays an answer to containerd. The daemon leaves
//! when nothing was left for `idle_timeout`, or after SIGTERM when all containers have ended.

use std::collections::HashMap;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Addr, System};
use anyhow::{Context, Result, bail};
use containerd_shim_protos::shim_async::create_task;
use containerd_shim_protos::ttrpc::r#async::{Server, Service};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use troupe_actors::guest::{CompileSettings, Stage};
use troupe_actors::{Drain, Events, Settings, Supervisor};

use crate::cgroup::Cgroup;
use crate::connections::Connections;
use crate::events::{self, Undelivered};
use crate::image::ContainerdImages;
use crate::launch::{Ready, ServeArgs, ServeParams};
use crate::logging::{self, Sinks};
use crate::metrics;
use crate::signals::Stop;
use crate::socket;
use crate::task::TaskService;

/// `start` handed our address out; containerd has this long to connect before we may think that nobody comes.
const QUIET: Duration = Duration::from_secs(5);
/// Exits are worth waiting for when leaving; a containerd that is gone is not.
const FLUSH: Duration = Duration::from_secs(3);
/// containerd has this long to fetch the exits and delete the containers of a daemon that was told to stop.
const CLAIM: Duration = Duration::from_secs(1);
const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;

/// Runs the daemon to its end.
///
/// # Errors
/// What kept it from starting; `start` has been told as well.
pub fn serve(params: ServeParams) -> Result<()> {
    let ServeParams { listener, ready, args } = params;
    let log = logging::start(args.options.log_level, args.debug);
    log.attach(&args.bundle);
    let prepared = prepare(&args);
    let (cgroup, guests) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            ready.fail(&error);
            return Err(error);
        }
    };
    // Native programs get the limit that we began with.
    troupe_actors::keep_descriptor_limit();
    raise_descriptor_limit();
    let result = System::new().block_on(run(listener, ready, args, log, &guests));
    if let Err(error) = &result {
        tracing::error!(error = format!("{error:#}"), "leaving");
    }
    // A guest's blocking call (a read from a dead network file system, say) must not keep the process.
    guests.shutdown_timeout(Duration::from_millis(500));
    if let Some(cgroup) = cgroup {
        cgroup.leave();
    }
    result
}

/// What has to be done while the process has one thread, and the threads of the guests.
fn prepare(args: &ServeArgs) -> Result<(Option<Cgroup>, Runtime)> {
    // First of all: what is used from here on is the pod's.
    let cgroup = args.cgroup.as_deref().map(Cgroup::join).transpose()?;
    troupe_actors::isolate().context("a shim has to run as root")?;
    troupe_actors::keep_a_thread().context("a thread for what blocks")?;
    Ok((cgroup, guests()?))
}

async fn run(listener: UnixListener, ready: Ready, args: ServeArgs, log: Sinks, guests: &Runtime) -> Result<()> {
    let mut daemon = match Daemon::new(listener, &args, log, guests).await {
        Ok(daemon) => daemon,
        Err(error) => {
            ready.fail(&error);
            return Err(error);
        }
    };
    ready.ok();
    tracing::info!(group = args.group, pid = std::process::id(), "serving");
    let mut stop = daemon.stop.take().context("signals are taken once")?;
    let mut containers = daemon.containers.clone();
    let why = tokio::select! {
        // The supervisor counts them as long as it lives.
        _ = containers.wait_for(|_| false) => None,
        () = daemon.until_idle() => Some("idle"),
        signal = stop.next() => {
            daemon.drain(signal, &mut stop).await;
            Some(signal)
        }
    };
    let Some(why) = why else {
        // Nobody can act on a container any more: containerd has to learn that they are gone.
        daemon.abandon();
        bail!("the supervisor is gone");
    };
    daemon.images.close();
    daemon.stage.programs.close().await;
    daemon.flush_events().await;
    drop(daemon.server.shutdown().await);
    tracing::info!(why, "leaving");
    Ok(())
}

struct Daemon {
    server: Server,
    supervisor: Addr<Supervisor>,
    stage: Arc<Stage>,
    images: Arc<ContainerdImages>,
    /// Containers, connections, events that containerd has not taken.
    containers: watch::Receiver<usize>,
    connections: watch::Receiver<usize>,
    undelivered: Undelivered,
    /// A second descriptor of the listener, to look at its queue when leaving.
    listener: UnixListener,
    socket: PathBuf,
    settings: Settings,
    stop: Option<Stop>,
}

impl Daemon {
    async fn new(listener: UnixListener, args: &ServeArgs, log: Sinks, guests: &Runtime) -> Result<Self> {
        let settings = args.options.settings();
        let stop = Some(Stop::listen().context("handle signals")?);
        let stage = Stage::new(CompileSettings::from(&settings), guests.handle().clone())?;
        let (events, told) = Events::channel();
        let (pending, undelivered) = watch::channel(0);
        actix::spawn(events::publish(args.ttrpc_address.clone(), told, pending));
        let (supervisor, containers) = Supervisor::new(Arc::clone(&stage), events);
        let supervisor = supervisor.start();
        let images = Arc::new(ContainerdImages::new(&args.containerd_address));
        let service = TaskService {
            supervisor: supervisor.clone(),
            namespace: args.namespace.clone(),
            settings: Arc::new(settings.clone()),
            images: images.clone(),
            log,
            cgroup_v2: metrics::host_has_cgroup_v2(),
        };
        let open = Connections::new();
        listener.set_nonblocking(true).context("the listener")?;
        let ours = listener.try_clone().context("the listener")?;
        let accepted = open.accept(tokio::net::UnixListener::from_std(listener).context("the listener")?);
        let mut server = Server::new().add_listener(accepted).register_service(services(&service));
        server.start().await.context("the ttrpc server")?;
        let (connections, socket) = (open.count(), args.socket.clone());
        Ok(Self {
            server,
            supervisor,
            stage,
            images,
            containers,
            connections,
            undelivered,
            listener: ours,
            socket,
            settings,
            stop,
        })
    }

    /// Returns when there is nothing left, nobody came for a while, and our socket is gone.
    async fn until_idle(&mut self) {
        loop {
            let (containers, connections) = (&mut self.containers, &mut self.connections);
            // Both senders live as long as the server and the supervisor.
            drop(containers.wait_for(|count| *count == 0).await);
            drop(connections.wait_for(|count| *count == 0).await);
            let came = async {
                tokio::select! {
                    _ = containers.changed() => {}
                    _ = connections.changed() => {}
                }
            };
            let disturbed = tokio::time::timeout(self.settings.idle_timeout, came).await.is_ok();
            if disturbed || *self.containers.borrow() > 0 || *self.connections.borrow() > 0 {
                continue;
            }
            let quiet = self.settings.idle_timeout.max(QUIET);
            match socket::retire(&self.listener, &self.socket, quiet) {
                Ok(true) => return,
                Ok(false) => tracing::debug!("staying: a container is on its way"),
                Err(error) => tracing::warn!(%error, "cannot leave yet"),
            }
        }
    }

    /// From here on new containers get another process.
    fn abandon(&self) {
        if let Err(error) = socket::abandon(&self.socket) {
            tracing::warn!(%error, "the socket stays behind");
        }
    }

    /// Ends all containers: politely, then, or at a second signal, at once.
    async fn drain(&self, signal: &str, stop: &mut Stop) {
        tracing::info!(signal, containers = *self.containers.borrow(), "stopping");
        self.abandon();
        let timeout = self.settings.drain_timeout;
        let polite = self.supervisor.send(Drain { signal: SIGTERM, timeout });
        let drained = tokio::select! {
            drained = polite => drained,
            signal = stop.next() => {
                tracing::warn!(signal, "a second signal: cutting off");
                self.supervisor.send(Drain { signal: SIGKILL, timeout: Duration::from_secs(1) }).await
            }
        };
        match drained {
            Ok(drained) => tracing::info!(polite = drained.polite, cut_off = drained.cut_off, "stopped"),
            Err(error) => tracing::error!(%error, "the supervisor is gone"),
        }
        self.until_claimed(stop).await;
    }

    /// Who waits for a container's exit deletes it next, and asks us. What nobody deletes goes with this process:
    /// containerd then runs `delete` for it.
    async fn until_claimed(&self, stop: &mut Stop) {
        let (mut containers, mut connections) = (self.containers.clone(), self.connections.clone());
        tokio::select! {
            _ = containers.wait_for(|count| *count == 0) => {}
            _ = connections.wait_for(|count| *count == 0) => {}
            () = tokio::time::sleep(CLAIM) => tracing::debug!(containers = *self.containers.borrow(), "not deleted"),
            _ = stop.next() => {}
        }
    }

    async fn flush_events(&mut self) {
        let flushed = self.undelivered.wait_for(|count| *count == 0);
        if tokio::time::timeout(FLUSH, flushed).await.is_err() {
            tracing::error!(events = *self.undelivered.borrow(), "leaving with events that containerd did not take");
        }
    }
}

/// The same handlers under the names of both versions of the task API.
fn services(service: &TaskService) -> HashMap<String, Service> {
    let under = |name: &str| {
        let made = create_task(Arc::new(service.clone()));
        made.into_values().map(|service| (name.to_owned(), service)).collect::<Vec<_>>()
    };
    ["containerd.task.v2.Task", "containerd.task.v3.Task"].into_iter().flat_map(under).collect()
}

/// The runtime of the guests. Its driver is asked for news after few polls: a guest that spins takes a whole tick for
/// each of its own, and others wait for their timers and pipes.
fn guests() -> Result<Runtime> {
    Builder::new_multi_thread()
        .thread_name("guest")
        .worker_threads(guest_threads())
        .event_interval(4)
        .enable_all()
        .build()
        .context("the guests' runtime")
}

/// More than cores: what the tick cannot interrupt (`memory.fill` of a gigabyte, its page faults) holds a thread for long,
/// and with threads to spare the kernel shares the cores among them. An idle one costs a few kilobytes.
fn guest_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).saturating_mul(2).max(8)
}

/// As many descriptors as we may have: every container takes some.
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "the limit of descriptors stays");
    }
}
