//! containerd's event stream, followed from its start to its end, so that a case can wait for what is yet to come as
//! well as look at what came and in which order.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::containerd::Containerd;
use super::job::{Collected, Job};
use super::{SOON, wait};

/// One event of a task.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub namespace: String,
    /// `create` of `/tasks/create`.
    pub verb: String,
    pub container: String,
    pub body: Value,
}

impl Event {
    /// The code an exit event carries; 0 is left out on the wire.
    pub fn exit_code(&self) -> u64 {
        self.body["exit_status"].as_u64().unwrap_or(0)
    }
}

/// `2026-11-21 00:00:00.1 +0000 UTC default /tasks/exit {"container_id":…}`; anything else is no event of a task.
fn parse(line: &str) -> Option<Event> {
    let (head, rest) = line.split_once(" /tasks/")?;
    let (verb, body) = rest.split_once(' ')?;
    let body: Value = serde_json::from_str(body).ok()?;
    Some(Event {
        namespace: head.rsplit(' ').next()?.to_owned(),
        verb: verb.to_owned(),
        container: body["container_id"].as_str()?.to_owned(),
        body,
    })
}

/// A running `ctr events`.
pub struct Events {
    stream: Arc<Collected>,
    _job: Job,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}

impl Events {
    /// Returns when the subscription is known to stand: `ctr` says nothing about it, so an event is provoked until it
    /// is seen.
    pub fn subscribe(containerd: &Containerd) -> Result<Self> {
        let mut command = containerd.ctr();
        command.arg("events");
        let job = Job::spawn(command)?;
        let stream = Arc::clone(&job.stdout);
        wait::until_true("the first event", SOON, || {
            let label = format!("seen={}", stream.so_far().len());
            let provoked = containerd.ctr().args(["namespaces", "create", "canary"]).output()?.status.success()
                || containerd.ctr().args(["namespaces", "label", "canary", &label]).output()?.status.success();
            Ok(provoked && stream.wait_text("/namespaces/", Duration::from_millis(200)).is_ok())
        })?;
        Ok(Self { stream, _job: job })
    }

    /// What came so far about a container.
    pub fn of(&self, namespace: &str, container: &str) -> Vec<Event> {
        select(&self.stream.so_far(), namespace, container)
    }

    /// Waits for an event of a container.
    pub fn wait(&self, namespace: &str, container: &str, verb: &str, limit: Duration) -> Result<Event> {
        let find = |bytes: &[u8]| select(bytes, namespace, container).into_iter().find(|event| event.verb == verb);
        self.stream
            .wait(&format!("/tasks/{verb} of {container}"), limit, find)
            .with_context(|| format!("{container} had {:?}", verbs(&self.of(namespace, container))))
    }

    /// Waits for the delete event and compares the verbs of the container's whole life.
    pub fn expect_life(&self, namespace: &str, container: &str, expected: &[&str]) -> Result<()> {
        self.wait(namespace, container, "delete", SOON)?;
        let seen = self.of(namespace, container);
        if verbs(&seen) != expected {
            bail!("expected the events {expected:?} of {container}, seen {:?}", verbs(&seen));
        }
        Ok(())
    }
}

fn verbs(events: &[Event]) -> Vec<&str> {
    events.iter().map(|event| event.verb.as_str()).collect()
}

fn select(bytes: &[u8], namespace: &str, container: &str) -> Vec<Event> {
    String::from_utf8_lossy(bytes)
        .lines()
        .filter(|line| line.contains(container))
        .filter_map(parse)
        .filter(|event| event.namespace == namespace && event.container == container)
        .collect()
}
