//! The store of one request: made for it, dropped after it.
//!
//! Most requests ask WASI for nothing but streams, so nothing else of it is made before the guest asks: its clocks,
//! randomness, environment and output in one piece, its files (an open folder) in another. Both at once, for every request,
//! were 12 % of a small one.
//!
//! Called by `serving.rs` and `shared.rs`.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use wasmtime::component::{HasData, Linker, ResourceTable};
use wasmtime::{Engine, Store, UpdateDeadline};
use wasmtime_wasi::filesystem::{WasiFilesystem, WasiFilesystemCtxView};
use wasmtime_wasi::p2::bindings::{filesystem, io};
use wasmtime_wasi::{FsPerms, WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};
use wasmtime_wasi_config::{WasiConfig, WasiConfigVariables};
use wasmtime_wasi_http::{WasiHttpCtx, WasiHttpCtxView, WasiHttpView};

use super::engine::Kind;
use super::epoch::{TICK, thread_cpu_time};
use super::hooks::Hooks;
use super::limits::{Budget, Meter};
use super::quota::CpuTime;
use super::sockets::{self, HasSockets, Sockets};
use super::store::{Environment, MAX_RANDOM, MAX_RESOURCES};
use crate::stdio::{Lines, Output};

/// What all requests of a container share.
#[derive(Clone)]
pub struct Host {
    pub environment: Arc<Environment>,
    pub stdout: Arc<Output>,
    pub stderr: Arc<Output>,
    /// Each line of output starts with its request's id.
    pub log_request_id: bool,
    pub budget: Arc<Budget>,
    pub cpu: Arc<CpuTime>,
    pub hooks: Hooks,
}

impl Host {
    /// The same for one connection: its requests count their references to this one, which no other core does.
    pub(super) fn of_connection(&self) -> Arc<Self> {
        Arc::new(Self { hooks: self.hooks.apart(), ..self.clone() })
    }
}

/// The data of a request's store.
pub struct Visitor {
    /// Dropped before the table: that tells a request's body that was cut off from one that is complete.
    hooks: Hooks,
    table: ResourceTable,
    /// All but files; of a guest of WASI 0.3, files as well.
    wasi: Option<Box<WasiCtx>>,
    files: Option<Box<WasiCtx>>,
    config: Option<Box<WasiConfigVariables>>,
    http: WasiHttpCtx,
    meter: Meter,
    host: Arc<Host>,
    /// Numbers the requests of a container; none where several share an instance.
    request: Option<u64>,
    /// WASI is asked for in one piece.
    whole: bool,
}

impl Visitor {
    /// The next request for this instance.
    pub(super) fn turn_to(&mut self, request: u64) {
        self.request = Some(request);
        // The next one's environment says its own number.
        self.wasi = None;
    }

    fn table(&mut self) -> &mut ResourceTable {
        &mut self.table
    }

    fn config(&mut self) -> WasiConfig<'_> {
        WasiConfig::new(self.config.get_or_insert_with(|| Box::new(self.host.environment.variables())))
    }

    fn files(&mut self) -> WasiFilesystemCtxView<'_> {
        let Self { files, table, host, request, .. } = self;
        let ctx = files.get_or_insert_with(|| Box::new(context(host, *request, true)));
        WasiFilesystemCtxView { ctx: ctx.filesystem(), table }
    }
}

/// Gives the guest WASI and `wasi:http`, of the versions that its engine can run.
pub(super) fn link(linker: &mut Linker<Visitor>, kind: Kind) -> wasmtime::Result<()> {
    wasmtime_wasi::p2::add_to_linker_async(linker)?;
    wasmtime_wasi_http::p2::add_only_http_to_linker_async(linker)?;
    wasmtime_wasi_config::add_to_linker(linker, Visitor::config)?;
    if kind == Kind::Concurrent {
        wasmtime_wasi::p3::add_to_linker(linker)?;
        wasmtime_wasi_http::p3::add_to_linker(linker)?;
        return sockets::link(linker, kind);
    }
    sockets::link(linker, kind)?;
    // These need less than all of WASI.
    linker.allow_shadowing(true);
    io::error::add_to_linker::<Visitor, Table>(linker, Visitor::table)?;
    io::poll::add_to_linker::<Visitor, Table>(linker, Visitor::table)?;
    io::streams::add_to_linker::<Visitor, Table>(linker, Visitor::table)?;
    filesystem::types::add_to_linker::<Visitor, WasiFilesystem>(linker, Visitor::files)?;
    filesystem::preopens::add_to_linker::<Visitor, WasiFilesystem>(linker, Visitor::files)?;
    linker.allow_shadowing(false);
    Ok(())
}

/// Streams and pollables live in the table alone.
struct Table;

impl HasData for Table {
    type Data<'a> = &'a mut ResourceTable;
}

impl HasSockets for Visitor {
    fn of_container(&self) -> Sockets {
        self.host.environment.sockets.clone()
    }
}

impl WasiView for Visitor {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        let Self { wasi, table, host, request, whole, .. } = self;
        WasiCtxView { ctx: wasi.get_or_insert_with(|| Box::new(context(host, *request, *whole))), table }
    }
}

impl WasiHttpView for Visitor {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView { hooks: &mut self.hooks, table: &mut self.table, ctx: &mut self.http }
    }
}

/// A store for the request of this number, or for several.
pub(super) fn store(engine: &Engine, kind: Kind, host: &Arc<Host>, request: Option<u64>) -> Store<Visitor> {
    let mut table = ResourceTable::new();
    table.set_max_capacity(MAX_RESOURCES);
    let visitor = Visitor {
        table,
        wasi: None,
        files: None,
        config: None,
        http: WasiHttpCtx::new(),
        hooks: host.hooks.clone(),
        meter: Meter::new(Arc::clone(&host.budget)),
        host: Arc::clone(host),
        request,
        whole: kind == Kind::Concurrent,
    };
    let mut store = Store::new(engine, visitor);
    store.limiter(|visitor| &mut visitor.meter);
    store.set_epoch_deadline(1);
    store.epoch_deadline_callback(|_| {
        TURN.set(TURN.get().at_tick(thread_cpu_time()));
        Ok(match TURN.get() {
            Turn::Over => UpdateDeadline::YieldCustom(1, Box::pin(tokio::task::yield_now())),
            Turn::Begun | Turn::Ticked(_) => UpdateDeadline::Continue(1),
        })
    });
    store
}

thread_local! {
    /// Of the guest that this thread polls.
    static TURN: Cell<Turn> = const { Cell::new(Turn::Begun) };
}

/// How far a guest is with its turn: it may run for a tick, and up to two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// No tick came yet.
    Begun,
    /// One came, at this CPU time of the thread. It is no reason to interrupt the guest: the epoch went on while it slept, or
    /// it began just before. Not by the clock on the wall: a guest whose core went to others for a while has not computed.
    Ticked(Duration),
    /// It had to be interrupted.
    Over,
}

impl Turn {
    fn at_tick(self, cpu_time: Duration) -> Self {
        match self {
            Self::Begun => Self::Ticked(cpu_time),
            Self::Ticked(first) if cpu_time.saturating_sub(first) < TICK => self,
            Self::Ticked(_) | Self::Over => Self::Over,
        }
    }
}

/// A guest is about to be polled on this thread.
pub(super) fn begin_turn() {
    TURN.set(Turn::Begun);
}

/// Whether the guest that is or was just polled on this thread had to be interrupted.
pub(super) fn is_spinning() -> bool {
    TURN.get() == Turn::Over
}

fn context(host: &Host, request: Option<u64>, with_files: bool) -> WasiCtx {
    let Environment { args, env, cwd, root, readonly, sockets, user: _ } = &*host.environment;
    let mut builder = WasiCtxBuilder::new();
    builder.args(args).envs(env).initial_cwd(cwd).max_random_size(MAX_RANDOM);
    if let Some(request) = request {
        builder.env("REQUEST_ID", request.to_string());
    }
    let prefix = request.filter(|_| host.log_request_id).map(|request| format!("[{request}] "));
    let lines = |output: &Arc<Output>| Lines::new(Arc::clone(output), prefix.clone());
    builder.stdout(lines(&host.stdout)).stderr(lines(&host.stderr));
    sockets.set_up(&mut builder);
    if let Some(root) = root.as_ref().filter(|_| with_files) {
        let permissions = if *readonly { FsPerms::ReadOnly } else { FsPerms::ReadWrite };
        if let Err(error) = builder.preopened_dir(root, "/", permissions) {
            tracing::error!(root = %root.display(), %error, "a request runs without files: its root cannot be opened");
        }
    }
    builder.build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_ends_after_a_tick_of_cpu_time() {
        let first = Turn::Begun.at_tick(5 * TICK);
        // Ticks came, and the core was with others.
        let stolen = (0..9).fold(first, |turn, _| turn.at_tick(5 * TICK + TICK / 10));
        assert_eq!(stolen, first);
        assert_eq!(stolen.at_tick(6 * TICK), Turn::Over);
        assert_eq!(Turn::Over.at_tick(6 * TICK), Turn::Over);
    }
}
