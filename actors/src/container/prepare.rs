//! Everything between `Create` and "created": bundle, root filesystem, program, streams, anchor.
//!
//! Runs as a task, never in a handler. What it made is either in the [`Prepared`] it returns or gone again.

use std::path::PathBuf;
use std::sync::Arc;

use super::program::{self, Wasm};
use super::work::Work;
use crate::ContainerId;
use crate::bundle::Bundle;
use crate::config::{Settings, SocketPolicy};
use crate::error::{Error, Result};
use crate::guest::{Budget, CpuTime, Entry, Environment, LoadError, Program, Run, Sockets, Stage};
use crate::http::{self, HttpSettings};
use crate::image::Images;
use crate::mounts::{Mount, RootFs, Volume};
use crate::names::{NameFiles, Names};
use crate::outgoing::ClientSettings;
use crate::pod::{Membership, Network, Pods, Role};
use crate::stdio::{Keeper, Stdio, StdioPaths};

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
    /// Asked when the root filesystem does not hold the program.
    pub images: Arc<dyn Images>,
}

/// A container that lacks nothing but its start.
pub struct Prepared {
    pub work: Work,
    pub stdin: Option<Keeper>,
    pub budget: Arc<Budget>,
    pub cpu: Arc<CpuTime>,
    pub held: Held,
}

/// What a container holds on the host until it is deleted. Dropping it blocks shortly.
#[derive(Debug)]
pub struct Held {
    pub pod: Membership,
    /// None without a root filesystem, or when the program cannot see it.
    pub rootfs: Option<RootFs>,
}

impl Held {
    /// Lets go of the root filesystem alone.
    async fn unmount(&mut self) {
        let rootfs = self.rootfs.take();
        if tokio::task::spawn_blocking(move || drop(rootfs)).await.is_err() {
            tracing::error!("releasing a root filesystem panicked");
        }
    }

    /// Lets go on a blocking thread; done when everything is gone.
    pub async fn release(self) {
        if tokio::task::spawn_blocking(move || drop(self)).await.is_err() {
            tracing::error!("releasing a container's mounts panicked");
        }
    }
}

/// Prepares a container.
///
/// # Errors
/// With the file and the cause; nothing is left behind.
pub async fn prepare(
    id: ContainerId,
    blueprint: Blueprint,
    stage: &Stage,
    http: &http::Common,
    pods: &Arc<Pods>,
) -> Result<Prepared> {
    let settings = Arc::clone(&blueprint.settings);
    let (name, pods) = (id.clone(), Arc::clone(pods));
    let (Found { bundle, program, stdio }, mut held) =
        tokio::task::spawn_blocking(move || on_the_host(&name, &blueprint, &pods))
            .await
            .map_err(|e| Error::Internal(format!("preparing the container: {e}")))??;
    let (budget, cpu) = (Budget::new(bundle.limits.memory), Arc::new(CpuTime::new(bundle.limits.cpu)));
    let Some(source) = program else {
        return Ok(Prepared { work: Work::Sandbox, stdin: None, budget, cpu, held });
    };
    let stdin = stdio.stdin_keeper();
    let parts = Parts { id, bundle, stdio, budget: Arc::clone(&budget), cpu: Arc::clone(&cpu) };
    match parts.work(source, &settings, &mut held, stage, http).await {
        Ok(work) => Ok(Prepared { work, stdin, budget, cpu, held }),
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
        let (network, names) = (held.pod.network(), Arc::new(self.names(held)));
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

    fn names(&self, held: &Held) -> Names {
        let files = NameFiles {
            rootfs: held.rootfs.as_ref().map(|rootfs| rootfs.path().to_owned()),
            hosts: self.bundle.hosts.clone(),
            resolv_conf: self.bundle.resolv_conf.clone(),
        };
        Names::new(files, held.pod.network())
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
        let workers = http.workers().map_err(|e| Error::host("start the threads that serve connections", e))?;
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
    }
}

/// What the blocking half found.
struct Found {
    bundle: Bundle,
    /// None of a pod's sandbox: its image is there for those who need a program to keep a pod.
    program: Option<program::Source>,
    stdio: Stdio,
}

/// The blocking half, cheap refusals first.
fn on_the_host(id: &ContainerId, blueprint: &Blueprint, pods: &Arc<Pods>) -> Result<(Found, Held)> {
    let mut bundle = Bundle::load(&blueprint.bundle)?;
    let stdio = Stdio::open(&blueprint.stdio)?;
    if bundle.role == Role::Sandbox {
        let pod = pods.enter(id, &bundle)?;
        return Ok((Found { bundle, program: None, stdio }, Held { pod, rootfs: None }));
    }
    let rootfs = root_of(&bundle, &blueprint.rootfs)?;
    let root = rootfs.as_ref().map(RootFs::path);
    let source = program::find(id, &bundle, root, &*blueprint.images, blueprint.settings.max_module_size)?;
    if bundle.args.is_empty() {
        // No program expects to be without a name.
        bundle.args.push(source.name.clone());
    }
    let pod = pods.enter(id, &bundle)?;
    Ok((Found { bundle, program: Some(source), stdio }, Held { pod, rootfs }))
}

/// The root filesystem with its volumes. Without one, volumes that somebody asked for have a root of their own.
fn root_of(bundle: &Bundle, mounts: &[Mount]) -> Result<Option<RootFs>> {
    let volumes = Volume::all(&bundle.mounts, &bundle.path)?;
    if !mounts.is_empty() || bundle.has_root() {
        return RootFs::mount(&bundle.path, &bundle.root, mounts, &volumes, bundle.readonly).map(Some);
    }
    if volumes.iter().all(Volume::is_usual) {
        return Ok(None);
    }
    RootFs::mount(&bundle.path, &bundle.root, &[RootFs::nothing()], &volumes, true).map(Some)
}
