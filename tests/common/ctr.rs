//! `ctr` in one namespace of a private containerd: run containers, act on their tasks.
//!
//! A foreground run is a [`Job`]: `ctr` holds the container's stdio, and its exit code is the container's. A detached
//! one is a [`Container`] that ends with its handle, so that a failed case leaves nothing to the next.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::containerd::Containerd;
use super::events::Event;
use super::job::{self, Done, Job};
use super::{SOON, image, proc, wait};

/// The runtime under test.
pub const WASMTIME: &str = "io.containerd.wasmtime.v1";

/// Numbers ids: unique within a run, and runs have containerds of their own.
static NEXT: AtomicU32 = AtomicU32::new(1);

#[derive(Debug, Clone)]
pub struct Client<'a> {
    pub containerd: &'a Containerd,
    pub namespace: String,
}

impl<'a> Client<'a> {
    pub fn new(containerd: &'a Containerd, namespace: &str) -> Self {
        Self { containerd, namespace: namespace.to_owned() }
    }

    /// `ctr --namespace …`.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = self.containerd.ctr();
        command.args(["--namespace", &self.namespace]).args(words);
        command
    }

    /// Runs a `ctr` command that has to succeed.
    pub fn ctr(&self, words: &[&str]) -> Result<String> {
        job::run(self.command(words), SOON)?.success(&format!("ctr {}", words.join(" ")))
    }

    /// Imports the image unless the namespace has it.
    pub fn import(&self, reference: &str, tar: &Path) -> Result<()> {
        if !self.ctr(&["images", "ls", "-q"])?.lines().any(|line| line == reference) {
            self.ctr(&["images", "import", "--all-platforms", &tar.display().to_string()])?;
        }
        Ok(())
    }

    /// A container of the image with all guests, not yet run.
    pub fn guest(&self, file: &str, arguments: &[&str]) -> Result<Run<'a>> {
        self.import(image::GUESTS, &image::guests()?)?;
        let mut words = vec![file.to_owned()];
        words.extend(arguments.iter().map(|&word| word.to_owned()));
        Ok(Run::new(self, image::GUESTS, words))
    }

    /// A container of any image; without words its entrypoint runs.
    pub fn image(&self, reference: &str, words: &[&str]) -> Run<'a> {
        Run::new(self, reference, words.iter().map(|&word| word.to_owned()).collect())
    }

    /// A container whose root filesystem is a folder of the test.
    pub fn rootfs(&self, folder: &Path, words: &[&str]) -> Run<'a> {
        self.image(&folder.display().to_string(), words).flag("--rootfs")
    }

    /// Ids and statuses of the tasks, as `ctr task ls` tells them.
    pub fn tasks(&self) -> Result<Vec<(String, String)>> {
        let table = self.ctr(&["task", "ls"])?;
        let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
        Ok(rows.filter(|row| row.len() == 3).map(|row| (row[0].to_owned(), row[2].to_owned())).collect())
    }

    /// The shim daemons that serve this namespace.
    pub fn daemons(&self) -> Vec<u32> {
        let word = format!("\"namespace\":\"{}\"", self.namespace);
        self.containerd.shims().into_iter().filter(|pid| proc::cmdline(*pid).contains(&word)).collect()
    }

    /// The only one.
    pub fn daemon(&self) -> Result<u32> {
        match self.daemons()[..] {
            [pid] => Ok(pid),
            ref other => bail!("expected one daemon of {}, there are {other:?}", self.namespace),
        }
    }

    /// No task and no container may be left.
    pub fn expect_empty(&self) -> Result<()> {
        let tasks = self.tasks()?;
        let containers = self.ctr(&["containers", "ls", "-q"])?;
        if !tasks.is_empty() || !containers.trim().is_empty() {
            bail!("left in {}: tasks {tasks:?}, containers {containers:?}", self.namespace);
        }
        Ok(())
    }
}

/// `ctr run`, as a builder.
#[derive(Debug, Clone)]
pub struct Run<'a> {
    client: Client<'a>,
    pub id: String,
    target: String,
    words: Vec<String>,
    flags: Vec<String>,
    runtime: String,
    options: Option<PathBuf>,
    patience: Duration,
}

impl<'a> Run<'a> {
    fn new(client: &Client<'a>, target: &str, words: Vec<String>) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self {
            client: client.clone(),
            id: format!("c{number}"),
            target: target.to_owned(),
            words,
            flags: Vec::new(),
            runtime: WASMTIME.to_owned(),
            options: Some(client.containerd.options()),
            patience: SOON,
        }
    }

    pub fn id(mut self, id: &str) -> Self {
        self.id = id.to_owned();
        self
    }

    pub fn flag(mut self, flag: &str) -> Self {
        self.flags.push(flag.to_owned());
        self
    }

    /// A flag with its value.
    pub fn option(self, flag: &str, value: &str) -> Self {
        self.flag(flag).flag(value)
    }

    pub fn runtime(mut self, name: &str) -> Self {
        self.runtime = name.to_owned();
        self.options = None;
        self
    }

    /// How long `ctr` may take: a large guest is compiled at its first start.
    pub fn within(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    pub fn containerd(&self) -> &'a Containerd {
        self.client.containerd
    }

    /// Another file of runtime options.
    pub fn options(mut self, file: PathBuf) -> Self {
        self.options = Some(file);
        self
    }

    fn command(&self, mode: &str) -> Command {
        let mut command = self.client.command(&["run", mode, "--runtime", &self.runtime]);
        let fifos: OsString = self.client.containerd.folder().join("fifo").into();
        command.arg("--fifo-dir").arg(fifos);
        if let Some(options) = &self.options {
            command.arg("--runtime-config-path").arg(options);
        }
        command.args(&self.flags).arg(&self.target).arg(&self.id).args(&self.words);
        command
    }

    /// The command line of a foreground run.
    pub fn foreground(&self) -> Command {
        self.command("--rm")
    }

    /// In the foreground, `ctr` taking the container away when it ended.
    pub fn spawn(&self) -> Result<Job> {
        Job::spawn(self.command("--rm"))
    }

    /// To its end, with nothing on stdin.
    pub fn to_end(&self) -> Result<Done> {
        self.spawn()?.finish(SOON)
    }

    /// To its end, which must have this code.
    pub fn expect(&self, code: i32) -> Result<Done> {
        let done = self.to_end()?;
        if done.code != Some(code) {
            bail!("expected code {code} of {:?}, got {:?}: {}{}", self.words, done.code, done.text(), done.stderr);
        }
        Ok(done)
    }

    /// To an error of `ctr run` that says `text`; no container may be left.
    pub fn expect_error(&self, text: &str) -> Result<()> {
        let done = self.to_end()?;
        if done.code == Some(0) || !done.stderr.contains(text) {
            bail!("expected an error with {text:?} of {:?}, got {:?}: {}", self.words, done.code, done.stderr);
        }
        if self.client.tasks()?.iter().any(|(id, _)| *id == self.id) {
            bail!("the task {} is left after: {}", self.id, done.stderr);
        }
        Ok(())
    }

    /// In the background, its output thrown away.
    pub fn detached(&self) -> Result<Container<'a>> {
        self.detach(self.clone().flag("--null-io").command("--detach"))
    }

    /// In the background, its output in a file, written by the shim.
    pub fn logged(&self, file: &Path) -> Result<Container<'a>> {
        let uri = format!("file://{}", file.display());
        self.detach(self.clone().option("--log-uri", &uri).command("--detach"))
    }

    fn detach(&self, command: Command) -> Result<Container<'a>> {
        let container = Container { client: self.client.clone(), id: self.id.clone() };
        job::run(command, self.patience)?.success(&format!("ctr run --detach {:?}", self.words))?;
        Ok(container)
    }

    /// The handle of a container that runs in the foreground.
    pub fn handle(&self) -> Container<'a> {
        Container { client: self.client.clone(), id: self.id.clone() }
    }
}

/// A container with its task. Dropped, it is killed and removed.
#[derive(Debug)]
pub struct Container<'a> {
    client: Client<'a>,
    pub id: String,
}

impl Container<'_> {
    fn task(&self, words: &[&str]) -> Command {
        let mut command = self.client.command(&["task"]);
        command.args(words).arg(&self.id);
        command
    }

    /// Sends a signal and tells how long it took from there to the exit event.
    pub fn kill_and_wait(&self, signal: &str) -> Result<(Event, Duration)> {
        let begin = Instant::now();
        self.kill(signal)?;
        Ok((self.exit()?, begin.elapsed()))
    }

    pub fn kill(&self, signal: &str) -> Result<()> {
        job::run(self.task(&["kill", "--signal", signal]), SOON)?.success("ctr task kill").map(drop)
    }

    /// `ctr task kill` that is to fail.
    pub fn kill_error(&self) -> Result<String> {
        Ok(job::run(self.task(&["kill", "--signal", "SIGKILL"]), SOON)?.stderr)
    }

    /// The exit, which is awaited.
    pub fn exit(&self) -> Result<Event> {
        self.exit_within(SOON)
    }

    pub fn exit_within(&self, limit: Duration) -> Result<Event> {
        self.client.containerd.with_events(|events| events.wait(&self.client.namespace, &self.id, "exit", limit))
    }

    pub fn wait_event(&self, verb: &str) -> Result<Event> {
        self.client.containerd.with_events(|events| events.wait(&self.client.namespace, &self.id, verb, SOON))
    }

    /// The status column of `ctr task ls`; `None` when the task is not listed.
    pub fn status(&self) -> Result<Option<String>> {
        Ok(self.client.tasks()?.into_iter().find(|(id, _)| *id == self.id).map(|(_, status)| status))
    }

    pub fn wait_status(&self, expected: &str) -> Result<()> {
        wait::until_true(&format!("{} to be {expected}", self.id), SOON, || {
            Ok(self.status()?.as_deref() == Some(expected))
        })
    }

    /// The number that containerd knows the task by.
    pub fn pid(&self) -> Result<u32> {
        let table = self.client.ctr(&["task", "ls"])?;
        let row = table.lines().find(|line| line.split_whitespace().next() == Some(&self.id));
        row.and_then(|row| row.split_whitespace().nth(1)?.parse().ok())
            .with_context(|| format!("{} is no task", self.id))
    }

    /// The process that holds it.
    pub fn daemon(&self) -> Result<u32> {
        proc::group_leader(self.pid()?)
    }

    /// `ctr task metrics`.
    pub fn metrics(&self) -> Result<String> {
        job::run(self.task(&["metrics"]), SOON)?.success("ctr task metrics")
    }

    /// `ctr task ps`.
    pub fn ps(&self) -> Result<String> {
        job::run(self.task(&["ps"]), SOON)?.success("ctr task ps")
    }

    /// Takes the container's stdio over.
    pub fn attach(&self) -> Result<Job> {
        Job::spawn(self.task(&["attach"]))
    }

    /// Removes the stopped task and the container.
    pub fn delete(self) -> Result<()> {
        job::run(self.task(&["delete"]), SOON)?.success("ctr task delete")?;
        self.delete_record()
    }

    /// Removes a container that has no task.
    pub fn delete_record(self) -> Result<()> {
        job::run(self.client.command(&["containers", "delete", &self.id]), SOON)?.success("ctr containers delete")?;
        Ok(())
    }

    fn is_left(&self) -> bool {
        let listed = job::run(self.client.command(&["containers", "ls", "-q"]), SOON);
        listed.is_ok_and(|done| done.text().lines().any(|line| line == self.id))
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        if self.is_left() {
            // Each fails where the case already did its part; what really is left shows when containerd is closed.
            let _ = job::run(self.task(&["delete", "--force"]), SOON);
            let _ = job::run(self.client.command(&["containers", "delete", &self.id]), SOON);
        }
    }
}
