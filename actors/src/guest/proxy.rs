//! A loaded server: a component that serves requests, linked once for all containers that run it.
//!
//! Called by `program.rs`; `serving.rs` makes instances of it.

use std::sync::OnceLock;

use wasmtime::Engine;
use wasmtime::component::{Component, InstancePre, Linker};
use wasmtime_wasi_http::p2::bindings::ProxyPre;
use wasmtime_wasi_http::p3::bindings::ServicePre;

use super::LoadError;
use super::engine::{Engines, Kind};
use super::swap::Watch;
use super::visitor::{self, Visitor};

/// A component that serves requests, linked once for all containers that run it.
pub struct Server {
    ready: Ready,
    /// The same on an engine that stays right when pages leave memory; made if that ever happens.
    remapping: OnceLock<Option<Ready>>,
    engines: Engines,
    kind: Kind,
}

/// Linked; what is left is a memory and a stack.
pub(super) enum Ready {
    /// `wasi:http/incoming-handler@0.2.x`.
    Proxy(ProxyPre<Visitor>),
    /// `wasi:http/handler@0.3.x`.
    Service(ServicePre<Visitor>),
}

impl Server {
    /// Links a component, or gives it back when it is no server.
    ///
    /// # Errors
    /// `Unlinkable`, naming the import that nobody provides.
    pub(super) fn link(engines: &Engines, kind: Kind, component: &Component) -> Result<Option<Self>, LoadError> {
        if !Ready::fits(component) {
            return Ok(None);
        }
        let ready = Ready::link(kind, component).map_err(|e| super::program::missing(&e))?;
        Ok(Some(Self { ready, remapping: OnceLock::new(), engines: engines.clone(), kind }))
    }

    pub(super) fn engine(&self) -> &Engine {
        self.ready.engine()
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    pub(super) fn component(&self) -> &Component {
        self.ready.component()
    }

    /// What is safe to use now.
    pub(super) fn ready(&self) -> &Ready {
        if !matches!(self.kind, Kind::Http(_)) || Watch::get().is_resident() {
            return &self.ready;
        }
        self.remapping.get_or_init(|| self.relink()).as_ref().unwrap_or(&self.ready)
    }

    fn relink(&self) -> Option<Ready> {
        let engine = self.engines.get_remapping(self.kind).ok()?;
        if Engine::same(&engine, self.ready.engine()) {
            return None;
        }
        let code = self.ready.component().serialize().ok()?;
        // SAFETY: the bytes are those of a component that runs in this process, and engines of one kind run the same code.
        let component = unsafe { Component::deserialize(&engine, code) };
        let relinked = component.and_then(|component| Ready::link(self.kind, &component));
        relinked.inspect_err(|error| tracing::error!(%error, "a server cannot be moved to the safe engine")).ok()
    }
}

impl Ready {
    fn fits(component: &Component) -> bool {
        let engine = component.engine();
        component.component_type().exports(engine).any(|(name, _)| {
            name.starts_with("wasi:http/incoming-handler@0.2") || name.starts_with("wasi:http/handler@0.3")
        })
    }

    fn link(kind: Kind, component: &Component) -> wasmtime::Result<Self> {
        let engine = component.engine();
        let mut linker = Linker::<Visitor>::new(engine);
        visitor::link(&mut linker, kind)?;
        let pre = linker.instantiate_pre(component)?;
        match ServicePre::new(pre.clone()) {
            Ok(service) => Ok(Self::Service(service)),
            Err(_) => ProxyPre::new(pre).map(Self::Proxy),
        }
    }

    fn pre(&self) -> &InstancePre<Visitor> {
        match self {
            Self::Proxy(pre) => pre.instance_pre(),
            Self::Service(pre) => pre.instance_pre(),
        }
    }

    fn component(&self) -> &Component {
        self.pre().component()
    }

    fn engine(&self) -> &Engine {
        self.pre().engine()
    }
}
