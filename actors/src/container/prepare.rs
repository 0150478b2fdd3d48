//! Everything between `Create` and "created": bundle, root filesystem, program, streams, anchor.
//!
//! Runs as a task, never in a handler. What it made is either in the [`Prepared`] it returns or gone again.

use std::path::PathBuf;
use std::sync::Arc;

use super::program;
use crate::bundle::Bundle;
use crate::error::{Error, Result};
use crate::guest::{Budget, CpuTime, Entry, Environment, Program, Stage};
use crate::mounts::{Mount, RootFs};
use crate::pod::Anchor;
use crate::stdio::{Keeper, Stdio, StdioPaths};

/// What a container is made of.
#[derive(Debug, Clone)]
pub struct Blueprint {
    pub bundle: PathBuf,
    pub rootfs: Vec<Mount>,
    pub stdio: StdioPaths,
    /// Largest wasm file that is read, in bytes.
    pub max_module_size: u64,
}

/// A container that lacks nothing but its start.
pub struct Prepared {
    pub program: Arc<Program>,
    pub entry: Entry,
    pub environment: Environment,
    pub stdio: Stdio,
    pub stdin: Option<Keeper>,
    pub budget: Arc<Budget>,
    pub cpu: Arc<CpuTime>,
    pub held: Held,
}

/// What a container holds on the host until it is deleted. Dropping it blocks shortly.
#[derive(Debug)]
pub struct Held {
    pub anchor: Anchor,
    pub rootfs: RootFs,
}

impl Held {
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
pub async fn prepare(blueprint: Blueprint, stage: &Stage) -> Result<Prepared> {
    let (bundle, source, stdio, held) = tokio::task::spawn_blocking(move || on_the_host(&blueprint))
        .await
        .map_err(|e| Error::Internal(format!("preparing the container: {e}")))??;
    let loaded = stage.programs.load(&source.name, source.wasm).await.and_then(|program| {
        let entry = program.entry(source.export.as_deref()).map_err(|e| e.about(&source.name))?;
        Ok((program, entry))
    });
    let (program, entry) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => {
            held.release().await;
            return Err(Error::Program(error.to_string()));
        }
    };
    let environment = Environment {
        args: bundle.args,
        env: bundle.env,
        cwd: bundle.cwd.to_string_lossy().into_owned(),
        root: Some(held.rootfs.path().to_owned()),
        readonly: bundle.readonly,
    };
    let budget = Budget::new(bundle.memory_limit);
    let (stdin, cpu) = (stdio.stdin_keeper(), Arc::default());
    Ok(Prepared { program, entry, environment, stdio, stdin, budget, cpu, held })
}

/// The blocking half, cheap refusals first.
fn on_the_host(blueprint: &Blueprint) -> Result<(Bundle, program::Source, Stdio, Held)> {
    let bundle = Bundle::load(&blueprint.bundle)?;
    let stdio = Stdio::open(&blueprint.stdio)?;
    let rootfs = RootFs::mount(&bundle.path, &bundle.root, &blueprint.rootfs, bundle.readonly)?;
    let source = program::read(&bundle, rootfs.path(), blueprint.max_module_size)?;
    let anchor = Anchor::start(&bundle.namespaces, bundle.hostname.as_deref())?;
    Ok((bundle, source, stdio, Held { anchor, rootfs }))
}
