//! The bare binary without containerd: bundles, `start`, the task service over ttrpc, and an endpoint that records the
//! events it publishes. What containerd would hide or smooth over can be asked here: error codes, order, leftovers.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedOutputStream, Message};
use containerd_shim_protos::shim_sync::{Client, TaskClient};
use containerd_shim_protos::ttrpc::{self, Code, context};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};

use super::containerd::IDLE;
use super::job::{Collected, Done, Job};
use super::recorder::Recorder;
use super::{SOON, base, proc, wait};

/// One shim with its own folder, group and events. Its daemon ends with it.
#[derive(Debug)]
pub struct Shim {
    folder: PathBuf,
    pub events: Recorder,
    binary: PathBuf,
}

impl Shim {
    pub fn new(name: &str) -> Result<Self> {
        let folder = base::folder(name)?;
        let binary = base::link_shim(&folder.join("bin"))?;
        let events = Recorder::listen(&folder.join("c.sock.ttrpc"))?;
        Ok(Self { folder, events, binary })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A bundle whose root filesystem holds just the guest, which is run with these arguments.
    pub fn bundle(&self, id: &str, guest: &Path, arguments: &[&str]) -> Result<Bundle> {
        let name = guest.file_name().context("a guest without a name")?;
        let mut words = vec![format!("/{}", name.to_string_lossy())];
        words.extend(arguments.iter().map(|&word| word.to_owned()));
        let bundle = self.bundle_of(id, &spec(&words))?;
        fs::copy(guest, bundle.folder.join("rootfs").join(name))?;
        Ok(bundle)
    }

    /// A bundle with this configuration and an empty root filesystem.
    pub fn bundle_of(&self, id: &str, spec: &Value) -> Result<Bundle> {
        let folder = self.folder.join("b").join(id);
        fs::create_dir_all(folder.join("rootfs"))?;
        fs::write(folder.join("config.json"), serde_json::to_vec(spec)?)?;
        let log = folder.join("log");
        if !log.exists() {
            fifo(&log)?;
        }
        // Opened for both, so that the shim's open finds a reader and this one never ends.
        Collected::follow(File::options().read(true).write(true).open(&log)?);
        Ok(Bundle { id: id.to_owned(), folder })
    }

    /// The binary as containerd calls it, for a verb.
    pub fn command(&self, verb: &str, bundle: &Bundle) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(["-namespace", "bare", "-id", &bundle.id, "-publish-binary", "/bin/false"])
            .arg("-address")
            .arg(self.folder.join("c.sock"))
            .arg(verb)
            .current_dir(&bundle.folder)
            .env("TTRPC_ADDRESS", self.folder.join("c.sock.ttrpc"));
        command
    }

    /// `start` with the default options of the tests.
    pub fn start(&self, bundle: &Bundle) -> Result<Done> {
        let folder = self.folder.display();
        self.start_with(bundle, &format!("cache_dir = \"{folder}/cache\"\nidle_timeout = \"{}s\"", IDLE.as_secs()))
    }

    /// `start` with these runtime options on stdin.
    pub fn start_with(&self, bundle: &Bundle, options: &str) -> Result<Done> {
        let mut job = Job::spawn(self.command("start", bundle))?;
        job.write(&runtime_options(options)?)?;
        job.finish(SOON)
    }

    /// `start` and a connection to what it answered.
    pub fn task(&self, bundle: &Bundle) -> Result<Task> {
        let done = self.start(bundle)?;
        Task::connect(&address(&done)?, bundle)
    }

    /// All three at once: a started container.
    pub fn running(&self, id: &str, guest: &Path, arguments: &[&str]) -> Result<Task> {
        let task = self.task(&self.bundle(id, guest, arguments)?)?;
        task.create()?;
        task.start()?;
        Ok(task)
    }

    /// Processes that serve.
    pub fn daemons(&self) -> Vec<u32> {
        proc::running(&self.folder.join("bin"), "serve")
    }

    /// The only one.
    pub fn daemon(&self) -> Result<u32> {
        match self.daemons()[..] {
            [pid] => Ok(pid),
            ref other => bail!("expected one daemon, there are {other:?}"),
        }
    }

    /// Waits for every process of it to end by itself and looks for what they left.
    pub fn expect_end(&self) -> Result<()> {
        wait::until_true("the daemon to end after its last container", IDLE + SOON, || {
            Ok(proc::running_below(&self.folder.join("bin")).is_empty())
        })?;
        let mounts = proc::mounts_below(&self.folder)?;
        if !mounts.is_empty() {
            bail!("left mounts: {mounts:?}");
        }
        Ok(())
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        for pid in proc::running_below(&self.folder.join("bin")) {
            // What it listens on lies outside of the folder, and a killed process cannot remove it. Any of this fails
            // where the process ends by itself at this moment.
            let sockets = proc::sockets(pid).unwrap_or_default();
            let _ = proc::signal(pid, rustix::process::Signal::KILL);
            sockets.into_iter().filter(|socket| socket.parent() != Some(&self.folder)).for_each(|socket| {
                let _ = fs::remove_file(socket);
            });
        }
    }
}

/// A bundle as containerd lays it out.
#[derive(Debug)]
pub struct Bundle {
    pub id: String,
    pub folder: PathBuf,
}

/// The task service of one container.
pub struct Task {
    client: TaskClient,
    pub id: String,
    pub folder: PathBuf,
}

impl Task {
    /// Connects to an address for a bundle's container.
    pub fn connect(address: &str, bundle: &Bundle) -> Result<Self> {
        let client = Client::connect(address).with_context(|| format!("cannot connect to {address}"))?;
        Ok(Self { client: TaskClient::new(client), id: bundle.id.clone(), folder: bundle.folder.clone() })
    }

    /// Without stdio.
    pub fn create(&self) -> ttrpc::Result<api::CreateTaskResponse> {
        self.create_with(|_| {})
    }

    pub fn create_with(
        &self,
        change: impl FnOnce(&mut api::CreateTaskRequest),
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let bundle = self.folder.display().to_string();
        let mut request = api::CreateTaskRequest { id: self.id.clone(), bundle, ..Default::default() };
        change(&mut request);
        self.client.create(short(), &request)
    }

    pub fn start(&self) -> ttrpc::Result<api::StartResponse> {
        self.client.start(short(), &api::StartRequest { id: self.id.clone(), ..Default::default() })
    }

    /// The exit code, awaited.
    pub fn wait(&self) -> ttrpc::Result<u32> {
        let request = api::WaitRequest { id: self.id.clone(), ..Default::default() };
        self.client.wait(short(), &request).map(|response| response.exit_status)
    }

    pub fn kill(&self, signal: u32) -> ttrpc::Result<()> {
        let request = api::KillRequest { id: self.id.clone(), signal, ..Default::default() };
        self.client.kill(short(), &request).map(drop)
    }

    pub fn delete(&self) -> ttrpc::Result<api::DeleteResponse> {
        self.client.delete(short(), &api::DeleteRequest { id: self.id.clone(), ..Default::default() })
    }

    pub fn state(&self) -> ttrpc::Result<api::StateResponse> {
        self.client.state(short(), &api::StateRequest { id: self.id.clone(), ..Default::default() })
    }

    pub fn shutdown(&self) -> ttrpc::Result<()> {
        self.client.shutdown(short(), &api::ShutdownRequest { id: self.id.clone(), ..Default::default() }).map(drop)
    }

    /// The rest of the service.
    pub fn client(&self) -> &TaskClient {
        &self.client
    }
}

/// Every call is bounded; a shim that does not answer shows as `DEADLINE_EXCEEDED`.
pub fn short() -> context::Context {
    context::with_duration(SOON)
}

/// Fails unless the call ended with this code and a sentence that contains `text`.
pub fn expect_code<T>(what: &str, result: ttrpc::Result<T>, code: Code, text: &str) -> Result<()> {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) if status.code() == code && status.message.contains(text) => Ok(()),
        Err(error) => bail!("{what}: expected {code:?} with {text:?}, got {error:?}"),
        Ok(_) => bail!("{what}: expected {code:?}, it succeeded"),
    }
}

/// The address in a reply to `start`: JSON or plain.
pub fn address(done: &Done) -> Result<String> {
    let text = done.text();
    if done.code != Some(0) || !done.stderr.is_empty() {
        bail!("start ended with {:?}: {text}{}", done.code, done.stderr);
    }
    match serde_json::from_str::<Value>(&text) {
        Ok(reply) => Ok(reply["address"].as_str().with_context(|| format!("no address in {text}"))?.to_owned()),
        Err(_) => Ok(text.trim().to_owned()),
    }
}

/// What containerd writes to `start`'s stdin: an `Any` of `runtimeoptions.v1.Options` with a `config_body`.
pub fn runtime_options(body: &str) -> Result<Vec<u8>> {
    let type_url = "runtimeoptions.v1.Options".to_owned();
    Ok(Any { type_url, value: runtime_options_value(body)?, ..Default::default() }.write_to_bytes()?)
}

/// The message in it.
pub fn runtime_options_value(body: &str) -> Result<Vec<u8>> {
    let mut value = Vec::new();
    let mut output = CodedOutputStream::vec(&mut value);
    output.write_string(3, body)?;
    output.flush()?;
    drop(output);
    Ok(value)
}

/// The least that a container needs to say.
pub fn spec(words: &[String]) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": { "args": words, "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 } },
        "root": { "path": "rootfs" },
        "linux": { "namespaces": [{ "type": "mount" }] },
    })
}

pub fn fifo(path: &Path) -> Result<()> {
    mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
        .with_context(|| format!("cannot make the FIFO {}", path.display()))
}

/// Calls a method by the full name of its service: the generated client knows only v3 of the task service.
pub fn call<T: Message>(address: &str, service: &str, method: &str, request: &impl Message) -> Result<T> {
    let request = ttrpc::Request {
        service: service.to_owned(),
        method: method.to_owned(),
        timeout_nano: SOON.as_nanos() as i64,
        payload: request.write_to_bytes()?,
        ..Default::default()
    };
    let response = Client::connect(address)?.request(request).with_context(|| format!("{service}/{method}"))?;
    Ok(T::parse_from_bytes(&response.payload)?)
}
