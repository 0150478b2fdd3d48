//! Everything between `Create` and "created": bundle, root filesystem, program, streams, anchor.
//!
//! Runs as a task, never in a handler. What it made is either in the [`Prepared`] it returns or gone again.

use std::path::PathBuf;
use std::sync::Arc;

use super::entrypoint::Entrypoint;
use super::program::{self, Wasm};
use super::work::Work;
use crate::ContainerId;
use crate::blocking::blocking;
use crate::bundle::Bundle;
use crate::config::{RuncOptions, Settings, SocketPolicy};
use crate::error::{Error, Result};
use crate::event::Events;
use crate::guest::{Budget, CpuTime, Entry, Environment, LoadError, Program, Run, Sockets, Stage};
use crate::http::{self, HttpSettings};
use crate::image::Images;
use crate::mounts::{Mount, RootFs, Volume};
use crate::names::{NameFiles, Names};
use crate::native;
use crate::outgoing::ClientSettings;
use crate::pod::{Membership, Network, Pods, Role};
use crate::stdio::{Keeper, Stdio, StdioPaths};
use crate::users::Identity;

/// The annotation of a container that is to have no sockets.
const SOCKETS: &str = "troupe.dev/sockets";

/// What a container is made of.
#[derive(Debug, Clone)]
pub struct Blueprint {
    pub bundle: PathBuf,
    /// None when the image has no root filesystem.
    pub rootfs: Vec<Mount>,
    pub stdio: StdioPaths,
    /// Of the process: how large a file may be, how servers behave.
    pub settings: Arc<Settings>,
    /// How runc is called, if this container says so itself.
    pub runc: Option<RuncOptions>,
    /// Asked when the root filesystem does not hold the program.
    pub images: Arc<dyn Images>,
}

/// A container that lacks nothing but its start.
pub struct Prepared {
    pub work: Work,
    /// What containerd is told: an anchor's thread, or a process.
    pub pid: u32,
    pub stdin: Option<Keeper>,
    pub budget: Arc<Budget>,
    pub cpu: Arc<CpuTime>,
    pub held: Held,
}

/// What a container holds on the host until it is deleted. Dropping it blocks shortly.
#[derive(Debug)]
pub struct Held {
    /// None for a native container outside a pod: it has processes.
    pub pod: Option<Membership>,
    /// None without a root filesystem, or when the program cannot see it.
    pub rootfs: Option<RootFs>,
    /// None for root.
    pub user: Option<Arc<Identity>>,
}

impl Held {
    fn pod(&self) -> Result<&Membership> {
        self.pod.as_ref().ok_or_else(|| Error::Internal("a guest has no pod".into()))
    }

    /// Lets go of the root filesystem alone.
    async fn unmount(&mut self) {
        let rootfs = self.rootfs.take();
        if blocking(move || drop(rootfs)).await.is_err() {
            tracing::error!("releasing a root filesystem panicked");
        }
    }

    /// Lets go on a blocking thread; done when everything is gone.
    pub async fn release(self) {
        if blocking(move || drop(self)).await.is_err() {
            tracing::error!("releasing a container's mounts panicked");
        }
    }
}

/// What the containers of a process share.
#[derive(Default)]
pub struct Shared {
    pub http: http::Common,
    pub native: native::Common,
    pub pods: Arc<Pods>,
}

/// What a container is.
enum Found {
    /// Its image is there for those who need a program to keep a pod.
    Sandbox(Membership),
    Wasm(Box<(Bundle, program::Source, Stdio, Held)>),
    Native(Held),
}

/// Prepares a container.
///
/// # Errors
/// With the file and the cause; nothing is left behind.
pub async fn prepare(
    id: ContainerId,
    blueprint: Blueprint,
    stage: &Stage,
    shared: &Shared,
    events: Events,
) -> Result<Prepared> {
    let (name, plan, pods) = (id.clone(), blueprint.clone(), Arc::clone(&shared.pods));
    let found = blocking(move || on_the_host(&name, &plan, &pods))
        .await
        .map_err(|e| Error::Internal(format!("preparing the container: {e}")))??;
    match found {
        Found::Sandbox(pod) => {
            let (pid, held) = (pod.tid(), Held { pod: Some(pod), rootfs: None, user: None });
            Ok(Prepared { work: Work::Sandbox, pid, stdin: None, budget: Budget::new(None), cpu: Arc::default(), held })
        }
        Found::Wasm(found) => guest(id, *found, &blueprint.settings, stage, &shared.http).await,
        Found::Native(held) => {
            let options = blueprint.runc.unwrap_or_else(|| blueprint.settings.runc.clone());
            let (bundle, stdio, runtime) = (blueprint.bundle, blueprint.stdio, stage.runtime.clone());
            let order = native::Order { id, bundle, stdio, options, runtime, events };
            linux_program(order, held, &shared.native).await
        }
    }
}

async fn linux_program(order: native::Order, held: Held, common: &native::Common) -> Result<Prepared> {
    match native::Task::create(order, common).await {
        Ok(task) => {
            let (pid, stdin) = (task.init().pid(), task.init().stdin_keeper());
            let (budget, cpu) = (Budget::new(None), Arc::default());
            Ok(Prepared { work: Work::Native(Arc::new(task)), pid, stdin, budget, cpu, held })
        }
        Err(error) => {
            held.release().await;
            Err(error)
        }
    }
}

async fn guest(
    id: ContainerId,
    found: (Bundle, program::Source, Stdio, Held),
    settings: &Settings,
    stage: &Stage,
    http: &http::Common,
) -> Result<Prepared> {
    let (bundle, source, stdio, mut held) = found;
    let (budget, cpu) = (Budget::new(bundle.limits.memory), Arc::new(CpuTime::new(bundle.limits.cpu)));
    let stdin = stdio.stdin_keeper();
    let parts = Parts { id, bundle, stdio, budget: Arc::clone(&budget), cpu: Arc::clone(&cpu) };
    match parts.work(source, settings, &mut held, stage, http).await {
        Ok(work) => {
            let pid = held.pod()?.tid();
            Ok(Prepared { work, pid, stdin, budget, cpu, held })
        }
        Err(error) => {
            held.release().await;
            Err(error)
        }
    }
}

/// What a container's work is made of.
struct Parts {
    id: ContainerId,
    bundle: Bundle,
    stdio: Stdio,
    budget: Arc<Budget>,
    cpu: Arc<CpuTime>,
}

impl Parts {
    async fn work(
        self,
        source: program::Source,
        defaults: &Settings,
        held: &mut Held,
        stage: &Stage,
        http: &http::Common,
    ) -> Result<Work> {
        // A mistake in a server's settings does not concern a command that happens to have such a variable.
        let settings = HttpSettings::resolve(&defaults.http, &self.bundle.annotations, &self.bundle.env);
        let bounds = settings.as_ref().map(|settings| settings.bounds_checks).unwrap_or_default();
        let (name, is_layer) = (&source.name, matches!(source.wasm, Wasm::Layer(_)));
        let program = match source.wasm {
            Wasm::File(wasm) => stage.programs.load(name, wasm, bounds).await,
            Wasm::Layer(content) => stage.programs.load_layer(name, content, bounds).await,
        };
        let program = program.map_err(refused)?;
        // What is mounted then is but the empty root that containerd makes for such an image.
        if is_layer && !program.uses_files() {
            held.unmount().await;
        }
        let entry = program.entry(source.export.as_deref()).map_err(|e| refused(e.about(&source.name)))?;
        let network = held.pod()?.network();
        let names = Arc::new(self.names(held, network.clone()));
        let sockets = match self.socket_policy(defaults.sockets)? {
            SocketPolicy::Allow => Sockets::allowed(network.clone(), Arc::clone(&names)),
            SocketPolicy::Deny => Sockets::denied(),
        };
        match entry {
            Entry::Serve => {
                let settings = settings.map_err(Error::Invalid)?;
                let environment = environment(&self.bundle, held, sockets, |name| !HttpSettings::is_variable(name));
                self.server(program, settings, environment, (network, names), http)
            }
            Entry::Export { .. } | Entry::Run | Entry::Function { .. } => {
                let environment = environment(&self.bundle, held, sockets, |_| true);
                let Self { stdio, budget, cpu, .. } = self;
                Ok(Work::Command(Box::new(Run { program, entry, environment, stdio, budget, cpu })))
            }
        }
    }

    fn names(&self, held: &Held, network: Network) -> Names {
        let files = NameFiles {
            rootfs: held.rootfs.as_ref().map(|rootfs| rootfs.path().to_owned()),
            hosts: self.bundle.hosts.clone(),
            resolv_conf: self.bundle.resolv_conf.clone(),
        };
        Names::new(files, network)
    }

    /// Who denies has the last word: a pod may be stricter than its runtime class, never more generous.
    fn socket_policy(&self, default: SocketPolicy) -> Result<SocketPolicy> {
        match self.bundle.annotations.get(SOCKETS) {
            Some(text) => {
                let asked = text.parse().map_err(|e| Error::invalid(format!("annotation {SOCKETS}: {e}")))?;
                Ok(if default == SocketPolicy::Deny { default } else { asked })
            }
            None => Ok(default),
        }
    }

    fn server(
        self,
        program: Arc<Program>,
        settings: HttpSettings,
        environment: Environment,
        (network, names): (Network, Arc<Names>),
        http: &http::Common,
    ) -> Result<Work> {
        let socket = network.bind(settings.socket_addr)?;
        let threads = |e| Error::host("start the threads that serve connections", e);
        let workers = http.workers().map_err(threads)?;
        if program.shares_instances() {
            workers.start_lone().map_err(threads)?;
        }
        let certificates = self.bundle.env.iter().find(|(name, _)| name == "SSL_CERT_FILE");
        let client = ClientSettings {
            container: self.id.clone(),
            policy: settings.outgoing.clone(),
            network,
            names,
            rootfs: environment.root.clone(),
            certificates: certificates.map(|(_, path)| path.into()),
        };
        let Self { id, stdio, budget, cpu, .. } = self;
        let slots = Arc::clone(&http.slots);
        let name = id.to_string();
        let plan = http::Plan { name, settings, program, environment, stdio, budget, cpu, client, workers, slots };
        Ok(Work::Server(Box::new(plan), socket))
    }
}

fn refused(error: LoadError) -> Error {
    match error {
        LoadError::Unreachable { file, why } => Error::host(file, std::io::Error::other(why)),
        error => Error::Program(error.to_string()),
    }
}

/// What the guest sees of its container; `shows` decides about its variables.
fn environment(bundle: &Bundle, held: &Held, sockets: Sockets, shows: impl Fn(&str) -> bool) -> Environment {
    Environment {
        args: bundle.args.clone(),
        env: bundle.env.iter().filter(|(name, _)| shows(name)).cloned().collect(),
        cwd: bundle.cwd.to_string_lossy().into_owned(),
        root: held.rootfs.as_ref().map(|rootfs| rootfs.path().to_owned()),
        readonly: held.rootfs.as_ref().is_some_and(|rootfs| !rootfs.is_writable()),
        sockets,
        user: held.user.clone(),
    }
}

/// The blocking half, cheap refusals first.
fn on_the_host(id: &ContainerId, blueprint: &Blueprint, pods: &Arc<Pods>) -> Result<Found> {
    let mut bundle = Bundle::load(&blueprint.bundle)?;
    if bundle.role == Role::Sandbox {
        return pods.enter(id, &bundle).map(Found::Sandbox);
    }
    let has_root = !blueprint.rootfs.is_empty() || bundle.has_root();
    let mount = || RootFs::mount(&bundle.path, &bundle.root, &blueprint.rootfs);
    let rootfs = has_root.then(mount).transpose()?;
    let rootfs = match rootfs {
        Some(rootfs) if is_native(&bundle, &rootfs) => {
            // Of a pod it keeps the namespaces that its spec names.
            let is_member = matches!(bundle.role, Role::Member(_));
            let pod = is_member.then(|| pods.enter(id, &bundle)).transpose()?;
            return Ok(Found::Native(Held { pod, rootfs: Some(rootfs), user: None }));
        }
        rootfs => rootfs,
    };
    if bundle.terminal {
        let why = "process.terminal: a terminal is not supported for wasm; run without -t/--tty";
        return Err(Error::Unsupported(why.into()));
    }
    let rootfs = furnished(&bundle, rootfs)?;
    let stdio = Stdio::open(&blueprint.stdio)?;
    let root = rootfs.as_ref().map(RootFs::path);
    let source = program::find(id, &bundle, root, &*blueprint.images, blueprint.settings.max_module_size)?;
    if bundle.args.is_empty() {
        // No program expects to be without a name.
        bundle.args.push(source.name.clone());
    }
    let pod = Some(pods.enter(id, &bundle)?);
    let user = Identity::of(&bundle.user)?;
    Ok(Found::Wasm(Box::new((bundle, source, stdio, Held { pod, rootfs, user }))))
}

/// The root filesystem with its volumes. Without one, volumes that somebody asked for have a root of their own.
fn furnished(bundle: &Bundle, rootfs: Option<RootFs>) -> Result<Option<RootFs>> {
    let volumes = Volume::all(&bundle.mounts, &bundle.path)?;
    let (mut rootfs, readonly) = match rootfs {
        Some(rootfs) => (rootfs, bundle.readonly),
        None if volumes.iter().all(Volume::is_usual) => return Ok(None),
        None => (RootFs::mount(&bundle.path, &bundle.root, &[RootFs::nothing()])?, true),
    };
    rootfs.furnish(&volumes, readonly)?;
    Ok(Some(rootfs))
}

/// A mistake in the entrypoint is told by whoever looks for wasm.
fn is_native(bundle: &Bundle, rootfs: &RootFs) -> bool {
    let paths = Entrypoint::of(bundle).map(|entrypoint| entrypoint.paths).unwrap_or_default();
    native::is_native(bundle, &paths, rootfs.path())
}
