//! One guest's store: its WASI context, its share of the memory budget, its place under the tick.

use std::path::PathBuf;
use std::sync::Arc;

use wasmtime::{Engine, Store, UpdateDeadline};
use wasmtime_wasi::p1::WasiP1Ctx;
use wasmtime_wasi::{FsPerms, WasiCtxBuilder, WasiCtxView, WasiView};
use wasmtime_wasi_config::{WasiConfig, WasiConfigVariables};

use super::limits::{Budget, Meter};
use super::sockets::{HasSockets, Sockets};
use crate::error::{Error, Result};
use crate::stdio::{Reader, Streams, Writer};
use crate::users::Identity;

/// Most WASI resources (open files, streams, pollables) a guest may hold: descriptors are the whole process's, and one
/// guest must not take them all.
pub(super) const MAX_RESOURCES: usize = 4096;

/// Most random bytes a component may ask for at once; more traps. They are made without a pause, some 3 ms for so many, on
/// a thread that others wait for. A module may ask for any number (see `random`).
pub(super) const MAX_RANDOM: u64 = 1 << 20;

/// What a guest is started with.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// Arguments, `argv[0]` first.
    pub args: Vec<String>,
    /// The container's environment; never the shim's own.
    pub env: Vec<(String, String)>,
    /// Working directory; only components have one, a preview-1 module starts in `/`.
    pub cwd: String,
    /// The root filesystem, seen as `/`.
    pub root: Option<PathBuf>,
    /// Whether nothing below `/` may be written.
    pub readonly: bool,
    /// What it may do with the network.
    pub sockets: Sockets,
    /// Whose rights decide about files; nobody's but the process's own if none.
    pub user: Option<Arc<Identity>>,
}

impl Environment {
    /// The environment as `wasi:config` gives it, which asks for one value at a time.
    pub(super) fn variables(&self) -> WasiConfigVariables {
        self.env.iter().cloned().collect()
    }
}

/// The data of a store.
pub struct Guest {
    /// Serves modules (preview 1) and components (0.2) alike.
    wasi: WasiP1Ctx,
    meter: Meter,
    environment: Arc<Environment>,
    /// Made when the guest asks for it.
    config: Option<WasiConfigVariables>,
}

impl Guest {
    pub(super) fn wasi(&mut self) -> &mut WasiP1Ctx {
        &mut self.wasi
    }

    pub(super) fn config(&mut self) -> WasiConfig<'_> {
        WasiConfig::new(self.config.get_or_insert_with(|| self.environment.variables()))
    }
}

impl HasSockets for Guest {
    fn of_container(&self) -> Sockets {
        self.environment.sockets.clone()
    }
}

impl WasiView for Guest {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        self.wasi.ctx()
    }
}

/// A store in which one instance can be made.
///
/// # Errors
/// `Host` when the root filesystem cannot be opened.
pub fn store(
    engine: &Engine,
    environment: Arc<Environment>,
    streams: &Streams,
    budget: &Arc<Budget>,
) -> Result<Store<Guest>> {
    let (wasi, meter) = (wasi(&environment, streams)?, Meter::new(Arc::clone(budget)));
    let mut guest = Guest { wasi, meter, environment, config: None };
    guest.ctx().table.set_max_capacity(MAX_RESOURCES);
    let mut store = Store::new(engine, guest);
    store.limiter(|guest| &mut guest.meter);
    store.set_epoch_deadline(1);
    // Whoever drives the guest decides about its end; the tick only makes it come up for air.
    store.epoch_deadline_callback(|_| Ok(UpdateDeadline::YieldCustom(1, Box::pin(tokio::task::yield_now()))));
    Ok(store)
}

fn wasi(env: &Environment, streams: &Streams) -> Result<WasiP1Ctx> {
    let mut builder = WasiCtxBuilder::new();
    builder.args(&env.args).envs(&env.env).initial_cwd(&env.cwd).max_random_size(MAX_RANDOM);
    if let Some(stdin) = &streams.stdin {
        builder.stdin(Reader(Arc::clone(stdin)));
    }
    builder.stdout(Writer(Arc::clone(&streams.stdout))).stderr(Writer(Arc::clone(&streams.stderr)));
    env.sockets.set_up(&mut builder);
    if let Some(root) = &env.root {
        let permissions = if env.readonly { FsPerms::ReadOnly } else { FsPerms::ReadWrite };
        builder
            .preopened_dir(root, "/", permissions)
            .map_err(|e| Error::host(format!("open {}", root.display()), std::io::Error::other(e)))?;
    }
    Ok(builder.build_p1())
}
