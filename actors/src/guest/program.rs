//! A loaded program: its imports resolved once, shared by every container that runs it.

use wasmtime::component;
use wasmtime::{InstancePre, Linker, Module};
use wasmtime_wasi::p1;
use wasmtime_wasi::p2::bindings::CommandPre;

use super::LoadError;
use super::code::Code;
use super::engine::{Engines, Kind};
use super::exit::ProcExit;
use super::proxy::Server;
use super::random;
use super::sockets;
use super::store::Guest;

/// A program, ready to be instantiated at the price of a memory and a stack.
pub enum Program {
    /// A WASI preview-1 module.
    Module(InstancePre<Guest>),
    /// A component; `command` when it exports `wasi:cli/run`.
    Component { pre: component::InstancePre<Guest>, command: Option<Command> },
    /// A component that serves requests.
    Server(Server),
}

/// `wasi:cli/run`, of either version.
pub enum Command {
    P2(CommandPre<Guest>),
    P3(wasmtime_wasi::p3::bindings::CommandPre<Guest>),
}

/// Where a container enters its program, found and checked when it is created.
#[derive(Debug, Clone)]
pub enum Entry {
    /// This function of a module: no arguments, and no result or an exit code.
    Export { name: String, returns_code: bool },
    /// `wasi:cli/run` of a component.
    Run,
    /// This function of a component: no arguments, and no result or a `result`.
    Function { index: component::ComponentExportIndex, returns_result: bool },
    /// Requests, as many as come.
    Serve,
}

impl Program {
    /// Resolves the imports of `code`: once per program and process, called by `Programs`.
    ///
    /// # Errors
    /// `Unlinkable`, naming the import that nobody provides.
    pub fn link(engines: &Engines, kind: Kind, code: Code) -> Result<Self, LoadError> {
        match code {
            Code::Module(module) => Self::link_module(&module),
            Code::Component(component) => match Server::link(engines, kind, &component)? {
                Some(server) => Ok(Self::Server(server)),
                None => Self::link_component(kind, &component),
            },
        }
    }

    /// The entry a container asks for: `export` of `app.wasm#export`, or the usual one.
    ///
    /// # Errors
    /// `Unlinkable`, with the names that would do.
    pub fn entry(&self, export: Option<&str>) -> Result<Entry, LoadError> {
        match (self, export) {
            (Self::Module(pre), name) => module_entry(pre.module(), name.unwrap_or("_start")),
            (Self::Component { command: Some(_), .. }, None) => Ok(Entry::Run),
            (Self::Component { pre, .. }, None) => Err(not_a_command(pre)),
            (Self::Component { pre, .. }, Some(name)) => component_entry(pre, name),
            (Self::Server(_), None) => Ok(Entry::Serve),
            (Self::Server(_), Some(name)) => Err(LoadError::unlinkable(format!(
                "it is a wasi:http server, which is entered by requests; leave out #{name}"
            ))),
        }
    }

    /// It serves, and its instances take several requests side by side, all from the thread where they began.
    pub fn shares_instances(&self) -> bool {
        matches!(self, Self::Server(server) if matches!(server.kind(), Kind::Concurrent))
    }

    /// Whether it, or what is done on its behalf (certificates and hosts of requests), can look into a root filesystem.
    pub fn uses_files(&self) -> bool {
        let component = |component: &component::Component| {
            let ty = component.component_type();
            ty.imports(component.engine()).any(|(name, _)| is_of_files(name))
        };
        match self {
            Self::Module(pre) => pre.module().imports().any(|import| is_of_files(import.name())),
            Self::Component { pre, .. } => component(pre.component()),
            Self::Server(server) => component(server.component()),
        }
    }

    fn link_module(module: &Module) -> Result<Self, LoadError> {
        let mut linker = Linker::new(module.engine());
        let linked = p1::add_to_linker_async(&mut linker, |guest: &mut Guest| guest.wasi()).and_then(|()| {
            linker.allow_shadowing(true);
            // The stock one refuses codes from 126 on.
            linker.func_wrap("wasi_snapshot_preview1", "proc_exit", |code: u32| -> wasmtime::Result<()> {
                Err(ProcExit(code).into())
            })?;
            // The stock one refuses large requests, because it keeps a thread for as long as they take.
            linker.func_wrap_async("wasi_snapshot_preview1", "random_get", |caller, (at, length): (u32, u32)| {
                Box::new(random::get(caller, at, length))
            })?;
            #[cfg(feature = "test-hooks")]
            linker.func_wrap("troupe_test", "panic", panic_on_purpose)?;
            Ok(())
        });
        linked.map_err(|e| LoadError::internal(format!("WASI cannot be linked: {e:#}")))?;
        linker.instantiate_pre(module).map(Self::Module).map_err(|e| missing(&e))
    }

    fn link_component(kind: Kind, component: &component::Component) -> Result<Self, LoadError> {
        let mut linker = component::Linker::new(component.engine());
        let linked = wasmtime_wasi::p2::add_to_linker_async(&mut linker)
            .and_then(|()| wasmtime_wasi_config::add_to_linker(&mut linker, Guest::config))
            .and_then(|()| match kind {
                Kind::Concurrent => wasmtime_wasi::p3::add_to_linker(&mut linker),
                Kind::Command | Kind::Http(_) => Ok(()),
            })
            .and_then(|()| sockets::link(&mut linker, kind));
        linked.map_err(|e| LoadError::internal(format!("WASI cannot be linked: {e:#}")))?;
        let pre = linker.instantiate_pre(component).map_err(|e| missing(&e))?;
        let p3 = || wasmtime_wasi::p3::bindings::CommandPre::new(pre.clone()).ok().map(Command::P3);
        let command = CommandPre::new(pre.clone()).ok().map(Command::P2).or_else(p3);
        Ok(Self::Component { pre, command })
    }
}

/// An import that leads to files: without paths and preopened folders a preview-1 module has none.
fn is_of_files(import: &str) -> bool {
    [
        "path_",
        "fd_prestat",
        "wasi:filesystem/",
        "wasi:sockets/ip-name",
        "wasi:http/outgoing",
        "wasi:http/client",
        "wasi:http/handler",
    ]
    .iter()
    .any(|start| import.starts_with(start))
}

/// The bug of ours that a test asks for.
#[cfg(feature = "test-hooks")]
#[expect(clippy::panic, reason = "it is what the hook is for")]
fn panic_on_purpose() {
    panic!("a host function panics, on purpose");
}

pub(super) fn missing(error: &wasmtime::Error) -> LoadError {
    LoadError::unlinkable(format!("it imports what this runtime does not provide: {error:#}"))
}

fn module_entry(module: &Module, name: &str) -> Result<Entry, LoadError> {
    let function = module.get_export(name).and_then(|export| export.func().cloned());
    let Some(function) = function.filter(|function| function.params().len() == 0) else {
        let fits = module.exports().filter(|e| e.ty().func().is_some_and(|f| f.params().len() == 0));
        return Err(no_entry(name, fits.map(|export| export.name().to_owned())));
    };
    let results: Vec<_> = function.results().collect();
    match results.as_slice() {
        [] => Ok(Entry::Export { name: name.to_owned(), returns_code: false }),
        [wasmtime::ValType::I32] => Ok(Entry::Export { name: name.to_owned(), returns_code: true }),
        _ => Err(LoadError::unlinkable(format!(
            "its function `{name}` returns {} values; an entry point returns nothing or an i32 exit code",
            results.len()
        ))),
    }
}

fn component_entry(pre: &component::InstancePre<Guest>, name: &str) -> Result<Entry, LoadError> {
    use component::types::ComponentItem;
    let exports = || pre.component().component_type();
    let found = pre.component().get_export(None, name);
    let Some((ComponentItem::ComponentFunc(function), index)) = found else {
        let engine = pre.engine();
        let functions: Vec<String> = exports()
            .exports(engine)
            .filter(|(_, item)| matches!(item.ty, ComponentItem::ComponentFunc(_)))
            .map(|(name, _)| name.to_owned())
            .collect();
        return Err(no_entry(name, functions.into_iter()));
    };
    let results: Vec<_> = function.results().collect();
    let returns_result = match results.as_slice() {
        [] => false,
        [component::Type::Result(_)] => true,
        _ => return Err(LoadError::unlinkable(format!("its function `{name}` returns neither nothing nor a result"))),
    };
    if function.params().len() > 0 {
        return Err(LoadError::unlinkable(format!("its function `{name}` takes arguments; an entry point takes none")));
    }
    Ok(Entry::Function { index, returns_result })
}

fn no_entry(name: &str, fits: impl Iterator<Item = String>) -> LoadError {
    let mut fits: Vec<_> = fits.take(20).collect();
    fits.sort();
    let fits = if fits.is_empty() { "it has none".to_owned() } else { format!("it has: {}", fits.join(", ")) };
    LoadError::unlinkable(format!("it exports no function `{name}` without arguments to start with; {fits}"))
}

fn not_a_command(pre: &component::InstancePre<Guest>) -> LoadError {
    let engine = pre.engine();
    let ty = pre.component().component_type();
    let names: Vec<String> = ty.exports(engine).map(|(name, _)| name.to_owned()).take(20).collect();
    LoadError::unlinkable(format!(
        "it exports neither wasi:cli/run to start with nor a wasi:http handler to serve; it exports: {}; name a function \
         as app.wasm#function",
        if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
    ))
}
