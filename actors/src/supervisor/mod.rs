//! The table of containers: the only writer of who exists.
//!
//! Never waits for a guest: a verb is passed on to the container it names, and what takes time runs as a future of this
//! actor. An id is reserved in the table before the first wait, so that two creates cannot race.

mod messages;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{
    Actor, ActorFutureExt, Addr, Context, Handler, Message, MessageResult, ResponseActFuture, ResponseFuture,
    WrapFuture, fut,
};
use tokio::sync::{oneshot, watch};

pub use messages::{Create, Delete, Drain, Drained, Find, Kill, List, Pass, Start, Update};

use crate::ContainerId;
use crate::container::{self, Container, Handle, Shared, prepare};
use crate::error::{Error, Result};
use crate::event::{EventKind, Events};
use crate::guest::Stage;

/// containerd sends a burst of verbs for every container of a node; the default of 16 would make the edge wait.
const MAILBOX: usize = 1024;

const SIGKILL: u32 = 9;

/// The actor.
pub struct Supervisor {
    table: HashMap<ContainerId, Slot>,
    /// How many slots are taken, for whoever decides when the daemon may leave.
    count: watch::Sender<usize>,
    stage: Arc<Stage>,
    shared: Arc<Shared>,
    events: Events,
    draining: bool,
}

enum Slot {
    /// `Create` is at work.
    Reserved,
    Live(Box<Live>),
}

#[derive(Clone)]
struct Live {
    addr: Addr<Container>,
    handle: Handle,
}

impl Supervisor {
    /// A supervisor of nothing yet. The receiver counts its containers.
    pub fn new(stage: Arc<Stage>, events: Events) -> (Self, watch::Receiver<usize>) {
        let (count, seen) = watch::channel(0);
        (Self { table: HashMap::new(), count, stage, shared: Arc::default(), events, draining: false }, seen)
    }

    fn live(&self, id: &ContainerId, verb: &'static str) -> Result<&Live> {
        match self.table.get(id) {
            Some(Slot::Live(live)) => Ok(live),
            Some(Slot::Reserved) => Err(Error::WrongState { id: id.clone(), verb, state: "being created" }),
            None => Err(Error::NotFound(id.clone())),
        }
    }

    fn reserve(&mut self, id: &ContainerId) -> Result<()> {
        if self.draining {
            return Err(Error::ShuttingDown);
        }
        match self.table.entry(id.clone()) {
            Entry::Occupied(_) => Err(Error::AlreadyExists(id.clone())),
            Entry::Vacant(slot) => {
                slot.insert(Slot::Reserved);
                self.counted();
                Ok(())
            }
        }
    }

    fn remove(&mut self, id: &ContainerId) {
        self.table.remove(id);
        self.counted();
    }

    fn counted(&self) {
        self.count.send_replace(self.table.len());
    }
}

impl Actor for Supervisor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX);
    }
}

impl Handler<Create> for Supervisor {
    type Result = ResponseActFuture<Self, Result<Handle>>;

    fn handle(&mut self, Create { id, blueprint }: Create, _: &mut Context<Self>) -> Self::Result {
        if let Err(refused) = self.reserve(&id) {
            return Box::pin(fut::ready(Err(refused)));
        }
        let (stage, shared, began) = (Arc::clone(&self.stage), Arc::clone(&self.shared), Instant::now());
        let events = self.events.clone();
        let (plan, name) = (blueprint.clone(), id.clone());
        // A task of its own, so that a panic ends no more than this.
        let prepared = actix::spawn(async move {
            #[cfg(feature = "test-hooks")]
            panic_on_demand(&name, "panics-when-prepared");
            prepare(name, plan, &stage, &shared, events).await
        });
        Box::pin(prepared.into_actor(self).map(move |prepared, act, _| {
            let prepared = prepared.unwrap_or_else(|error| Err(Error::Internal(format!("preparing it: {error}"))));
            let prepared = prepared.inspect_err(|error| {
                tracing::warn!(container = %id, %error, "not created");
                act.remove(&id);
            })?;
            let container = Container::new(id.clone(), blueprint, prepared, Arc::clone(&act.stage), act.events.clone());
            let handle = container.handle();
            let created =
                EventKind::Created { bundle: handle.bundle.clone(), stdio: handle.stdio.clone(), pid: handle.pid };
            act.events.tell(&id, created);
            let elapsed_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            tracing::info!(container = %id, pid = handle.pid, elapsed_us, "created");
            let live = Live { addr: container.start(), handle: handle.clone() };
            act.table.insert(id, Slot::Live(Box::new(live)));
            Ok(handle)
        }))
    }
}

impl Handler<Start> for Supervisor {
    type Result = ResponseFuture<Result<u32>>;

    fn handle(&mut self, Start(id): Start, _: &mut Context<Self>) -> Self::Result {
        #[cfg(feature = "test-hooks")]
        panic_on_demand(&id, "panics-when-started");
        match self.live(&id, "start") {
            Ok(live) => {
                let (started, pid) = (live.addr.send(container::Start), live.handle.pid);
                Box::pin(async move { started.await?.map(|()| pid) })
            }
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }
}

impl Handler<Kill> for Supervisor {
    type Result = ();

    fn handle(&mut self, Kill { id, signal, all, reply }: Kill, _: &mut Context<Self>) {
        match self.live(&id, "kill") {
            Ok(live) => {
                tracing::info!(container = %id, signal, "signalled");
                live.addr.do_send(container::Kill { signal, all, reply });
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    }
}

impl Handler<Update> for Supervisor {
    type Result = ResponseFuture<Result<()>>;

    fn handle(&mut self, Update { id, resources }: Update, _: &mut Context<Self>) -> Self::Result {
        match self.live(&id, "update") {
            Ok(live) => {
                let updated = live.addr.send(container::Update(resources));
                Box::pin(async move { updated.await? })
            }
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }
}

impl Handler<Delete> for Supervisor {
    type Result = ResponseActFuture<Self, Result<container::Exit>>;

    fn handle(&mut self, Delete(id): Delete, _: &mut Context<Self>) -> Self::Result {
        let (deleted, pid) = match self.live(&id, "delete") {
            Ok(live) => (live.addr.send(container::Delete), live.handle.pid),
            Err(error) => return Box::pin(fut::ready(Err(error))),
        };
        Box::pin(deleted.into_actor(self).map(move |answer, act, _| {
            let exit = answer??;
            act.remove(&id);
            act.events.tell(&id, EventKind::Deleted { pid, code: exit.code, exited_at: exit.at });
            tracing::info!(container = %id, "deleted");
            Ok(exit)
        }))
    }
}

impl<M, T> Handler<Pass<M>> for Supervisor
where
    M: Message<Result = Result<T>> + Send + 'static,
    T: Send + 'static,
    Container: Handler<M>,
{
    type Result = ResponseFuture<Result<T>>;

    fn handle(&mut self, Pass { id, message }: Pass<M>, _: &mut Context<Self>) -> Self::Result {
        match self.live(&id, "act on") {
            Ok(live) => {
                let answer = live.addr.send(message);
                Box::pin(async move { answer.await? })
            }
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }
}

impl Handler<Find> for Supervisor {
    type Result = Result<Handle>;

    /// What is being created is not there yet: containerd lists a task before it exists, and asks for its state.
    fn handle(&mut self, Find(id): Find, _: &mut Context<Self>) -> Result<Handle> {
        match self.table.get(&id).and_then(Slot::live) {
            Some(live) => Ok(live.handle),
            None => Err(Error::NotFound(id)),
        }
    }
}

impl Handler<List> for Supervisor {
    type Result = MessageResult<List>;

    fn handle(&mut self, _: List, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.table.values().filter_map(Slot::live).map(|live| live.handle).collect())
    }
}

impl Handler<Drain> for Supervisor {
    type Result = ResponseFuture<Drained>;

    fn handle(&mut self, drain: Drain, _: &mut Context<Self>) -> Self::Result {
        self.draining = true;
        let live: Vec<_> = self.table.values().filter_map(Slot::live).collect();
        let ends = live.into_iter().map(|live| end(live, drain.signal, drain.timeout));
        let ends: Vec<_> = ends.map(actix::spawn).collect();
        Box::pin(async move {
            let mut drained = Drained::default();
            for end in ends {
                match end.await {
                    Ok(true) => drained.polite += 1,
                    Ok(false) | Err(_) => drained.cut_off += 1,
                }
            }
            drained
        })
    }
}

impl Slot {
    fn live(&self) -> Option<Live> {
        match self {
            Self::Reserved => None,
            Self::Live(live) => Some(Live::clone(live)),
        }
    }
}

/// Ends one container in two steps; true when the first was enough. It stays in the table, for containerd to read its
/// exit and to delete it.
async fn end(live: Live, signal: u32, timeout: Duration) -> bool {
    let Live { addr, mut handle } = live;
    signal_container(&addr, signal).await;
    let polite = tokio::time::timeout(timeout, handle.wait()).await.is_ok();
    if !polite {
        tracing::warn!(container = %handle.id, ?timeout, "cut off: it did not end in time");
        signal_container(&addr, SIGKILL).await;
        if let Err(error) = handle.wait().await {
            tracing::error!(container = %handle.id, %error, "lost while shutting down");
        }
    }
    polite
}

/// What no test could bring about from outside: the id asks for it.
#[cfg(feature = "test-hooks")]
fn panic_on_demand(id: &ContainerId, name: &str) {
    assert!(!id.to_string().ends_with(name), "a panic on demand");
}

/// An answer that says "already finished" is as good as any.
async fn signal_container(addr: &Addr<Container>, signal: u32) {
    let (reply, answer) = oneshot::channel();
    addr.do_send(container::Kill { signal, all: false, reply });
    drop(answer.await);
}
