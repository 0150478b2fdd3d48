//! Everything between `Create` and "created": bundle, root filesystem, program, streams, anchor.
//!
//! Runs as a task, never in a handler. What it made is either in the [`Prepared`] it returns or gone again.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::program;
use super::work::Work;
use crate::ContainerId;
use crate::bundle::Bundle;
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::guest::{Budget, CpuTime, Entry, Environment, LoadError, Program, Run, Stage};
use crate::http::{self, HttpSettings};
use crate::image::Images;
use crate::mounts::{Mount, RootFs};
use crate::outgoing::ClientSettings;
use crate::pod::Anchor;
use crate::stdio::{Keeper, Stdio, StdioPaths};

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
    pub anchor: Anchor,
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
pub async fn prepare(id: ContainerId, blueprint: Blueprint, stage: &Stage, http: &http::Common) -> Result<Prepared> {
    let settings = Arc::clone(&blueprint.settings);
    let name = id.clone();
    let (bundle, source, stdio, mut held) = tokio::task::spawn_blocking(move || on_the_host(&name, &blueprint))
        .await
        .map_err(|e| Error::Internal(format!("preparing the container: {e}")))??;
    let stdin = stdio.stdin_keeper();
    let (budget, cpu) = (Budget::new(bundle.memory_limit), Arc::<CpuTime>::default());
    let parts = Parts { id, bundle, stdio, budget: Arc::clone(&budget), cpu: Arc::clone(&cpu) };
    match parts.work(source, &settings.http, &mut held, stage, http).await {
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
        options: &BTreeMap<String, String>,
        held: &mut Held,
        stage: &Stage,
        http: &http::Common,
    ) -> Result<Work> {
        // A mistake in a server's settings does not concern a command that happens to have such a variable.
        let settings = HttpSettings::resolve(options, &self.bundle.annotations, &self.bundle.env);
        let bounds = settings.as_ref().map(|settings| settings.bounds_checks).unwrap_or_default();
        let refused = |error: LoadError| Error::Program(error.to_string());
        let program = stage.programs.load(&source.name, source.wasm, bounds).await.map_err(refused)?;
        // What is mounted then is but the empty root that containerd makes for such an image.
        if source.is_layer && !program.uses_files() {
            held.unmount().await;
        }
        let entry = program.entry(source.export.as_deref()).map_err(|e| refused(e.about(&source.name)))?;
        match entry {
            Entry::Serve => self.server(program, settings.map_err(Error::Invalid)?, held, http).await,
            Entry::Export { .. } | Entry::Run | Entry::Function { .. } => {
                let environment = environment(&self.bundle, held, |_| true);
                let Self { stdio, budget, cpu, .. } = self;
                Ok(Work::Command(Box::new(Run { program, entry, environment, stdio, budget, cpu })))
            }
        }
    }

    async fn server(
        self,
        program: Arc<Program>,
        settings: HttpSettings,
        held: &Held,
        http: &http::Common,
    ) -> Result<Work> {
        let network = held.anchor.network();
        let socket = network.bind(settings.socket_addr).await?;
        let workers = http.workers().map_err(|e| Error::host("start the threads that serve connections", e))?;
        let environment = environment(&self.bundle, held, |name| !HttpSettings::is_variable(name));
        let certificates = self.bundle.env.iter().find(|(name, _)| name == "SSL_CERT_FILE");
        let client = ClientSettings {
            container: self.id.clone(),
            policy: settings.outgoing.clone(),
            network,
            rootfs: environment.root.clone(),
            hosts: self.bundle.hosts.clone(),
            certificates: certificates.map(|(_, path)| path.into()),
        };
        let Self { id, stdio, budget, cpu, .. } = self;
        let slots = Arc::clone(&http.slots);
        let name = id.to_string();
        let plan = http::Plan { name, settings, program, environment, stdio, budget, cpu, client, workers, slots };
        Ok(Work::Server(Box::new(plan), socket))
    }
}

/// What the guest sees of its container; `shows` decides about its variables.
fn environment(bundle: &Bundle, held: &Held, shows: impl Fn(&str) -> bool) -> Environment {
    Environment {
        args: bundle.args.clone(),
        env: bundle.env.iter().filter(|(name, _)| shows(name)).cloned().collect(),
        cwd: bundle.cwd.to_string_lossy().into_owned(),
        root: held.rootfs.as_ref().map(|rootfs| rootfs.path().to_owned()),
        readonly: bundle.readonly,
    }
}

/// The blocking half, cheap refusals first.
fn on_the_host(id: &ContainerId, blueprint: &Blueprint) -> Result<(Bundle, program::Source, Stdio, Held)> {
    let mut bundle = Bundle::load(&blueprint.bundle)?;
    let stdio = Stdio::open(&blueprint.stdio)?;
    let has_root = !blueprint.rootfs.is_empty() || bundle.has_root();
    let mount = || RootFs::mount(&bundle.path, &bundle.root, &blueprint.rootfs, bundle.readonly);
    let rootfs = has_root.then(mount).transpose()?;
    let root = rootfs.as_ref().map(RootFs::path);
    let source = program::find(id, &bundle, root, &*blueprint.images, blueprint.settings.max_module_size)?;
    if bundle.args.is_empty() {
        // No program expects to be without a name.
        bundle.args.push(source.name.clone());
    }
    let anchor = Anchor::start(&bundle.namespaces, bundle.hostname.as_deref())?;
    Ok((bundle, source, stdio, Held { anchor, rootfs }))
}
