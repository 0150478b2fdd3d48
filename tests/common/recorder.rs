//! containerd's events endpoint as far as a shim needs it: it records what is forwarded, in order.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskExit, TaskOOM, TaskStart};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::shim_sync::{Events, create_events};
use containerd_shim_protos::ttrpc::{self, Server, TtrpcContext};

use super::{SOON, wait};

/// One published event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// `create` of `/tasks/create`.
    pub verb: String,
    pub container: String,
    /// Of an exit.
    pub code: Option<u32>,
}

#[derive(Debug, Clone, Default)]
struct Log(Arc<Mutex<Vec<Seen>>>);

pub struct Recorder {
    log: Log,
    server: Option<Server>,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Recorder").field(&self.seen()).finish()
    }
}

impl Recorder {
    pub fn listen(socket: &Path) -> Result<Self> {
        let log = Log::default();
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .with_context(|| format!("cannot listen on {}", socket.display()))?
            .register_service(create_events(Arc::new(log.clone())));
        server.start().context("cannot serve events")?;
        Ok(Self { log, server: Some(server) })
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.log.lock().clone()
    }

    pub fn of(&self, container: &str) -> Vec<Seen> {
        self.seen().into_iter().filter(|seen| seen.container == container).collect()
    }

    /// Waits for the event.
    pub fn wait(&self, container: &str, verb: &str) -> Result<Seen> {
        let what = format!("/tasks/{verb} of {container}");
        wait::until(&what, SOON, || Ok(self.of(container).into_iter().find(|seen| seen.verb == verb)))
            .with_context(|| format!("seen: {:?}", self.of(container)))
    }

    /// Waits for the last of these and compares the whole life of the container.
    pub fn expect_life(&self, container: &str, verbs: &[&str]) -> Result<()> {
        self.wait(container, verbs.last().context("no verbs")?)?;
        let seen = self.of(container);
        if seen.iter().map(|event| event.verb.as_str()).ne(verbs.iter().copied()) {
            bail!("expected {verbs:?} of {container}, seen {seen:?}");
        }
        Ok(())
    }
}

impl Recorder {
    /// Goes away as containerd does when it is stopped.
    pub fn close(&mut self) {
        if let Some(server) = self.server.take() {
            server.shutdown();
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.close();
    }
}

impl Log {
    fn lock(&self) -> MutexGuard<'_, Vec<Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Events for Log {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        let verb = envelope.topic.trim_start_matches("/tasks/").to_owned();
        let body = envelope.event.unwrap_or_default().value;
        let mut code = None;
        let container = match verb.as_str() {
            "create" => TaskCreate::parse_from_bytes(&body).map(|event| event.container_id),
            "start" => TaskStart::parse_from_bytes(&body).map(|event| event.container_id),
            "oom" => TaskOOM::parse_from_bytes(&body).map(|event| event.container_id),
            "delete" => TaskDelete::parse_from_bytes(&body).map(|event| event.container_id),
            "exit" => TaskExit::parse_from_bytes(&body).map(|event| {
                code = Some(event.exit_status);
                event.container_id
            }),
            _ => Ok(String::new()),
        };
        let container = container.unwrap_or_else(|error| format!("{verb} that is no event: {error}"));
        self.lock().push(Seen { verb, container, code });
        Ok(Empty::default())
    }
}
