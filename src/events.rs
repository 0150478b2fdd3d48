//! The ordered publisher: what actors tell, handed to containerd one by one.
//!
//! ```text
//! actors ── Event ──▶ Queue (bounded, exits never dropped) ── Forward ──▶ containerd (TTRPC_ADDRESS)
//!                        ▲                                      │ refused, gone, slow
//!                        └────────────── the same one again ◀───┘
//! ```
//! The order of one task's events is the order of the channel, because the next is sent only when containerd has taken
//! the one before. After a restart containerd listens at the same address; until then the queue waits.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use containerd_shim::util::convert_to_any;
use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::protobuf::{MessageDyn, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::{topics, ttrpc};
use tokio::sync::{mpsc, watch};
use troupe_actors::{Event, EventKind};

/// Events that wait at most. Creates, starts and deletes give way beyond it; exits do not.
const CAPACITY: usize = 16 << 10;
/// containerd has this long to take one event.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);
/// Between attempts: first, and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// An event that containerd answers with an error this often is dropped, or it would hold up all others.
const REFUSALS: u32 = 5;

/// Counts what containerd has not taken yet.
pub type Undelivered = watch::Receiver<usize>;

/// Publishes whatever comes through `events` until the channel closes and the queue is empty. Never fails: it retries.
pub async fn publish(address: String, mut events: mpsc::UnboundedReceiver<Event>, undelivered: watch::Sender<usize>) {
    let mut queue = Queue::default();
    let mut containerd = Containerd { address, client: None };
    let mut open = true;
    loop {
        undelivered.send_replace(queue.len());
        let Some(front) = queue.front() else {
            match events.recv().await {
                Some(event) => queue.push(event),
                None => return,
            }
            continue;
        };
        let mut delivery = std::pin::pin!(containerd.deliver(&front));
        loop {
            tokio::select! {
                () = &mut delivery => break,
                event = events.recv(), if open => match event {
                    Some(event) => queue.push(event),
                    None => open = false,
                },
            }
            undelivered.send_replace(queue.len());
        }
        queue.pop();
    }
}

/// What waits, in order.
#[derive(Default)]
struct Queue {
    events: VecDeque<Event>,
}

impl Queue {
    fn push(&mut self, event: Event) {
        self.events.push_back(event);
        if self.events.len() > CAPACITY {
            // Not the front: it is on its way.
            let spare = self.events.iter().skip(1).position(|event| !matters(&event.kind));
            if let Some(dropped) = spare.and_then(|index| self.events.remove(index + 1)) {
                tracing::error!(container = %dropped.id, "event dropped: containerd has taken none for a long time");
            }
        }
    }

    fn front(&self) -> Option<Event> {
        self.events.front().cloned()
    }

    fn pop(&mut self) {
        self.events.pop_front();
    }

    fn len(&self) -> usize {
        self.events.len()
    }
}

fn matters(kind: &EventKind) -> bool {
    match kind {
        EventKind::Exited { .. } | EventKind::ExecExited { .. } | EventKind::OutOfMemory => true,
        EventKind::Created { .. }
        | EventKind::Started { .. }
        | EventKind::Paused
        | EventKind::Resumed
        | EventKind::ExecAdded { .. }
        | EventKind::ExecStarted { .. }
        | EventKind::Deleted { .. } => false,
    }
}

struct Containerd {
    address: String,
    client: Option<EventsClient>,
}

impl Containerd {
    /// Returns when containerd has taken the event, or has refused it for good.
    async fn deliver(&mut self, event: &Event) {
        let mut refusals = 0;
        let mut backoff = BACKOFF.0;
        loop {
            match self.forward(event).await {
                Ok(()) => return,
                Err(error) => {
                    refusals += u32::from(matches!(error.downcast_ref(), Some(ttrpc::Error::RpcStatus(_))));
                    if refusals >= REFUSALS {
                        tracing::error!(container = %event.id, %error, "event dropped: containerd refuses it");
                        return;
                    }
                    tracing::debug!(container = %event.id, %error, "event not taken yet");
                }
            }
            // The connection may be the reason, also when the error does not say so.
            self.client = None;
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF.1);
        }
    }

    async fn forward(&mut self, event: &Event) -> Result<()> {
        let request = ForwardRequest { envelope: MessageField::some(envelope(event)?), ..Default::default() };
        let client = match self.client.take() {
            Some(client) => client,
            None => EventsClient::new(Client::connect(&url(&self.address)).await?),
        };
        let forwarded = client.forward(ttrpc::context::with_duration(FORWARD_TIMEOUT), &request);
        tokio::time::timeout(FORWARD_TIMEOUT, forwarded).await.context("containerd takes too long")??;
        self.client = Some(client);
        Ok(())
    }
}

fn url(address: &str) -> String {
    if address.contains("://") { address.to_owned() } else { format!("unix://{address}") }
}

fn envelope(event: &Event) -> Result<Envelope> {
    let (topic, message) = encode(event);
    Ok(Envelope {
        timestamp: MessageField::some(timestamp(event.at)),
        namespace: event.id.namespace().to_owned(),
        topic: topic.to_owned(),
        event: MessageField::some(convert_to_any(message)?),
        ..Default::default()
    })
}

fn encode(event: &Event) -> (&'static str, Box<dyn MessageDyn>) {
    let container_id = event.id.id().to_owned();
    match &event.kind {
        EventKind::Created { bundle, stdio, pid } => {
            let io = TaskIO {
                stdin: stdio.stdin.clone(),
                stdout: stdio.stdout.clone(),
                stderr: stdio.stderr.clone(),
                terminal: stdio.terminal,
                ..Default::default()
            };
            let (bundle, io) = (bundle.display().to_string(), MessageField::some(io));
            let created = TaskCreate { container_id, bundle, io, pid: *pid, ..Default::default() };
            (topics::TASK_CREATE_EVENT_TOPIC, Box::new(created))
        }
        EventKind::Started { pid } => {
            let started = TaskStart { container_id, pid: *pid, ..Default::default() };
            (topics::TASK_START_EVENT_TOPIC, Box::new(started))
        }
        EventKind::OutOfMemory => {
            (topics::TASK_OOM_EVENT_TOPIC, Box::new(TaskOOM { container_id, ..Default::default() }))
        }
        EventKind::Exited { pid, code } => exit(container_id.clone(), container_id, (*pid, *code), event.at),
        EventKind::ExecExited { exec, pid, code } => exit(exec.clone(), container_id, (*pid, *code), event.at),
        EventKind::Paused => {
            (topics::TASK_PAUSED_EVENT_TOPIC, Box::new(TaskPaused { container_id, ..Default::default() }))
        }
        EventKind::Resumed => {
            (topics::TASK_RESUMED_EVENT_TOPIC, Box::new(TaskResumed { container_id, ..Default::default() }))
        }
        EventKind::ExecAdded { exec } => {
            let added = TaskExecAdded { container_id, exec_id: exec.clone(), ..Default::default() };
            (topics::TASK_EXEC_ADDED_EVENT_TOPIC, Box::new(added))
        }
        EventKind::ExecStarted { exec, pid } => {
            let started = TaskExecStarted { container_id, exec_id: exec.clone(), pid: *pid, ..Default::default() };
            (topics::TASK_EXEC_STARTED_EVENT_TOPIC, Box::new(started))
        }
        EventKind::Deleted { pid, code, exited_at } => {
            let deleted = TaskDelete {
                container_id,
                pid: *pid,
                exit_status: *code,
                exited_at: MessageField::some(timestamp(*exited_at)),
                ..Default::default()
            };
            (topics::TASK_DELETE_EVENT_TOPIC, Box::new(deleted))
        }
    }
}

/// `id` is the container's own, or an exec's.
fn exit(
    id: String,
    container_id: String,
    (pid, code): (u32, u32),
    at: SystemTime,
) -> (&'static str, Box<dyn MessageDyn>) {
    let exited = TaskExit {
        container_id,
        id,
        pid,
        exit_status: code,
        exited_at: MessageField::some(timestamp(at)),
        ..Default::default()
    };
    (topics::TASK_EXIT_EVENT_TOPIC, Box::new(exited))
}

/// A time as protobuf has it; before 1970 is 1970.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use troupe_actors::ContainerId;

    use super::*;

    fn event(number: usize, kind: EventKind) -> Event {
        Event { id: ContainerId::new("ns", &number.to_string()), at: SystemTime::UNIX_EPOCH, kind }
    }

    #[test]
    fn a_full_queue_drops_starts_and_keeps_exits_in_order() {
        let mut queue = Queue::default();
        for number in 0..CAPACITY {
            queue.push(event(number, EventKind::Started { pid: 1 }));
        }
        for number in CAPACITY..CAPACITY + 10 {
            queue.push(event(number, EventKind::Exited { pid: 1, code: 0 }));
        }
        assert_eq!(queue.len(), CAPACITY);
        assert_eq!(queue.front().unwrap().id.id(), "0", "what is on its way stays");
        let exits: Vec<_> = queue.events.iter().filter(|e| matters(&e.kind)).map(|e| e.id.id().to_owned()).collect();
        assert_eq!(exits, (CAPACITY..CAPACITY + 10).map(|n| n.to_string()).collect::<Vec<_>>());
    }

    #[test]
    fn an_event_names_its_topic_task_and_type() {
        let sent = envelope(&event(7, EventKind::Exited { pid: 9, code: 3 })).unwrap();
        assert_eq!((sent.topic.as_str(), sent.namespace.as_str()), ("/tasks/exit", "ns"));
        assert_eq!(sent.event.type_url, "containerd.events.TaskExit");
    }
}
