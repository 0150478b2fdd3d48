//! containerd's own API, used as a program with its client library would: images that no tool would make, and containers
//! that `ctr run` refuses to make, because it insists on an image config and a root filesystem. The CNCF's artifact is
//! one of those; a kubelet runs it through CRI (suite pods_images), here it is done by hand.

use std::collections::HashMap;
use std::fs;
use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{PrepareSnapshotRequest, RemoveSnapshotRequest};
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::{
    Container as Record, CreateContainerRequest, CreateImageRequest, CreateTaskRequest, DeleteImageRequest, Image,
    MetricsRequest, StartRequest, UpdateTaskRequest, WriteAction, WriteContentRequest, container::Runtime as RuntimeOf,
};
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Code, Request, Response, Status};
use containerd_client::types::{Descriptor, Mount};
use prost_types::Any;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tokio::runtime::Runtime;

use super::containerd::Containerd;
use super::ctr::{Client, Container, WASMTIME};
use super::usage::Usage;
use super::{SOON, base, shim};

pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const WASM: &str = "application/wasm";
pub const WASM_CONFIG: &str = "application/vnd.wasm.config.v0+json";

static NEXT: AtomicU32 = AtomicU32::new(1);

/// A connection for one namespace.
pub struct Api<'a> {
    containerd: &'a Containerd,
    pub client: Client<'a>,
    runtime: Runtime,
    channel: Channel,
}

impl<'a> Api<'a> {
    pub fn connect(containerd: &'a Containerd, namespace: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let channel = runtime.block_on(containerd_client::connect(containerd.socket()))?;
        Ok(Self { containerd, client: containerd.namespace(namespace), runtime, channel })
    }

    fn call<T, F: Future<Output = Result<Response<T>, Status>>>(&self, what: &str, call: F) -> Result<T> {
        let answer = self.runtime.block_on(async { tokio::time::timeout(SOON, call).await });
        Ok(answer.with_context(|| format!("{what}: no answer"))?.with_context(|| what.to_owned())?.into_inner())
    }

    fn request<T>(&self, message: T) -> Result<Request<T>> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.client.namespace.parse()?);
        Ok(request)
    }

    /// Stores a blob for good and returns what leads to it.
    pub fn put(&self, media_type: &str, data: &[u8]) -> Result<Value> {
        let digest = digest(data);
        let write = WriteContentRequest {
            action: WriteAction::Commit.into(),
            r#ref: format!("test-{digest}"),
            total: i64::try_from(data.len())?,
            expected: digest.clone(),
            data: data.to_vec(),
            labels: HashMap::from([("containerd.io/gc.root".to_owned(), "test".to_owned())]),
            ..Default::default()
        };
        let mut content = ContentClient::new(self.channel.clone());
        let request = self.request(futures::stream::iter([write]))?;
        let written = self.runtime.block_on(async {
            let mut answers = content.write(request).await?.into_inner();
            while answers.message().await?.is_some() {}
            Ok(())
        });
        match written {
            Ok(()) => {}
            Err(status) if Status::code(&status) == Code::AlreadyExists => {}
            Err(status) => return Err(status).context("content.Write"),
        }
        Ok(json!({ "mediaType": media_type, "digest": digest, "size": data.len() }))
    }

    pub fn put_json(&self, media_type: &str, value: &Value) -> Result<Value> {
        self.put(media_type, value.to_string().as_bytes())
    }

    /// Gives what a descriptor leads to a name, in place of what had it before.
    pub fn name(&self, name: &str, target: &Value) -> Result<()> {
        let target = Descriptor {
            media_type: target["mediaType"].as_str().unwrap_or_default().to_owned(),
            digest: target["digest"].as_str().context("no digest")?.to_owned(),
            size: target["size"].as_i64().context("no size")?,
            ..Default::default()
        };
        self.forget(name)?;
        let image = Image { name: name.to_owned(), target: Some(target), ..Default::default() };
        let request = self.request(CreateImageRequest { image: Some(image), ..Default::default() })?;
        self.call("images.Create", ImagesClient::new(self.channel.clone()).create(request)).map(drop)
    }

    /// Changes a task's limits, as CRI's UpdateContainerResources does: the parts of `linux.resources` that change.
    pub fn update(&self, id: &str, resources: &Value) -> Result<()> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: resources.to_string().into_bytes(),
        };
        let (container_id, resources) = (id.to_owned(), Some(resources));
        let request = self.request(UpdateTaskRequest { container_id, resources, ..Default::default() })?;
        self.call("tasks.Update", TasksClient::new(self.channel.clone()).update(request)).map(drop)
    }

    /// What a task uses.
    pub fn usage(&self, id: &str) -> Result<Usage> {
        let request = self.request(MetricsRequest { filters: vec![format!("id=={id}")] })?;
        let answer = self.call("tasks.Metrics", TasksClient::new(self.channel.clone()).metrics(request))?;
        let metric = answer.metrics.into_iter().next().with_context(|| format!("{id} has no metrics"))?;
        let data = metric.data.with_context(|| format!("{id} has empty metrics"))?;
        Usage::decode(&data.type_url, &data.value)
    }

    /// Takes a name away, if it is there.
    pub fn forget(&self, name: &str) -> Result<()> {
        let request = self.request(DeleteImageRequest { name: name.to_owned(), sync: true, ..Default::default() })?;
        match self.runtime.block_on(ImagesClient::new(self.channel.clone()).delete(request)) {
            Err(status) if status.code() != Code::NotFound => Err(status).context("images.Delete"),
            _ => Ok(()),
        }
    }

    /// An artifact of these modules: their titles, none for an empty one, and bytes.
    pub fn artifact(&self, name: &str, modules: &[(&str, &[u8])]) -> Result<()> {
        let layers = modules.iter().map(|(title, bytes)| self.layer(WASM, title, bytes)).collect::<Result<_>>()?;
        let manifest = self.manifest(layers)?;
        self.name(name, &manifest)
    }

    pub fn layer(&self, media_type: &str, title: &str, bytes: &[u8]) -> Result<Value> {
        let mut layer = self.put(media_type, bytes)?;
        if !title.is_empty() {
            layer["annotations"] = json!({ "org.opencontainers.image.title": title });
        }
        Ok(layer)
    }

    /// A manifest with the artifact's config.
    pub fn manifest(&self, layers: Vec<Value>) -> Result<Value> {
        let digests: Vec<_> = layers.iter().map(|layer| layer["digest"].clone()).collect();
        let config = json!({ "architecture": "wasm", "os": "wasip1", "layerDigests": digests });
        let config = self.put_json(WASM_CONFIG, &config)?;
        let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers });
        self.put_json(MANIFEST, &manifest)
    }

    /// Where containerd keeps a blob.
    pub fn blob_file(&self, descriptor: &Value) -> Result<PathBuf> {
        let digest = descriptor["digest"].as_str().context("no digest")?;
        let name = digest.strip_prefix("sha256:").context("not sha256")?;
        Ok(self.containerd.folder().join("root/io.containerd.content.v1.content/blobs/sha256").join(name))
    }

    /// A container of an image, not yet made.
    pub fn container(&self, image: &str, words: &[&str]) -> Plan<'_, 'a> {
        let words: Vec<_> = words.iter().map(|&word| word.to_owned()).collect();
        let id = format!("a{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let image = image.to_owned();
        Plan { api: self, id, image, spec: shim::spec(&words), has_snapshot: false, options: String::new() }
    }
}

/// What a container is to be.
pub struct Plan<'b, 'a> {
    api: &'b Api<'a>,
    pub id: String,
    image: String,
    spec: Value,
    has_snapshot: bool,
    options: String,
}

impl<'a> Plan<'_, 'a> {
    /// With an empty root filesystem, as CRI makes it for an image that brings none.
    pub fn snapshot(mut self) -> Self {
        self.has_snapshot = true;
        self
    }

    /// With further runtime options.
    pub fn options(mut self, lines: &str) -> Self {
        self.options = lines.to_owned();
        self
    }

    /// With another specification.
    pub fn spec(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.spec);
        self
    }

    pub fn log(&self) -> Result<PathBuf> {
        Ok(base::folder("logs")?.join(format!("{}-{}", self.api.containerd.version, self.id)))
    }

    /// Makes and starts it. The handle is of `ctr`, which can do all the rest.
    pub fn start(&self) -> Result<Container<'a>> {
        let container = self.record()?;
        self.create()?;
        let request = self.api.request(StartRequest { container_id: self.id.clone(), ..Default::default() })?;
        self.api.call("tasks.Start", TasksClient::new(self.api.channel.clone()).start(request))?;
        Ok(container)
    }

    /// Runs it to its end, which must have this code; returns what it wrote.
    pub fn expect(&self, code: u64) -> Result<String> {
        let container = self.start()?;
        let exit = container.exit()?;
        let output = fs::read_to_string(self.log()?)?;
        ensure!(exit.exit_code() == code, "{}: expected code {code}, got {exit:?}: {output}", self.id);
        container.delete()?;
        self.forget()?;
        Ok(output)
    }

    /// Makes it, which must fail with an error that says all of these words. Nothing is left.
    pub fn expect_error(&self, words: &[&str]) -> Result<String> {
        let container = self.record()?;
        let Err(error) = self.create() else { bail!("{}: a task was made, expected {words:?}", self.id) };
        container.delete_record()?;
        self.forget()?;
        let error = format!("{error:#}");
        for word in words {
            ensure!(error.contains(word), "{}: expected {word:?} in: {error}", self.id);
        }
        ensure!(!self.api.client.tasks()?.iter().any(|(id, _)| *id == self.id), "the task is left after: {error}");
        Ok(error)
    }

    /// Makes the container, without a task. Dropped, the handle takes both away.
    pub fn record(&self) -> Result<Container<'a>> {
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".to_owned(),
            value: self.spec.to_string().into_bytes(),
        };
        let options = self.api.containerd.default_options() + &self.options;
        let options = shim::runtime_options_value(&options)?;
        let options = Any { type_url: "runtimeoptions.v1.Options".to_owned(), value: options };
        let record = Record {
            id: self.id.clone(),
            image: self.image.clone(),
            runtime: Some(RuntimeOf { name: WASMTIME.to_owned(), options: Some(options) }),
            spec: Some(spec),
            snapshotter: if self.has_snapshot { "overlayfs".to_owned() } else { String::new() },
            snapshot_key: if self.has_snapshot { self.id.clone() } else { String::new() },
            ..Default::default()
        };
        let request = self.api.request(CreateContainerRequest { container: Some(record) })?;
        self.api.call("containers.Create", ContainersClient::new(self.api.channel.clone()).create(request))?;
        Ok(self.api.client.image(&self.image, &[]).id(&self.id).handle())
    }

    fn create(&self) -> Result<()> {
        let rootfs = if self.has_snapshot { self.prepare()? } else { Vec::new() };
        let log = format!("file://{}", self.log()?.display());
        let request = CreateTaskRequest {
            container_id: self.id.clone(),
            rootfs,
            stdout: log.clone(),
            stderr: log,
            ..Default::default()
        };
        let request = self.api.request(request)?;
        self.api.call("tasks.Create", TasksClient::new(self.api.channel.clone()).create(request)).map(drop)
    }

    fn prepare(&self) -> Result<Vec<Mount>> {
        let (snapshotter, key) = ("overlayfs".to_owned(), self.id.clone());
        let request = self.api.request(PrepareSnapshotRequest { snapshotter, key, ..Default::default() })?;
        let mut snapshots = SnapshotsClient::new(self.api.channel.clone());
        Ok(self.api.call("snapshots.Prepare", snapshots.prepare(request))?.mounts)
    }

    /// Takes the snapshot away, if it has one.
    pub fn forget(&self) -> Result<()> {
        if !self.has_snapshot {
            return Ok(());
        }
        let (snapshotter, key) = ("overlayfs".to_owned(), self.id.clone());
        let request = self.api.request(RemoveSnapshotRequest { snapshotter, key })?;
        let mut snapshots = SnapshotsClient::new(self.api.channel.clone());
        match self.api.runtime.block_on(snapshots.remove(request)) {
            // containerd itself clears up behind a container that is gone.
            Err(status) if status.code() != Code::NotFound => Err(status).context("snapshots.Remove"),
            _ => Ok(()),
        }
    }
}

pub fn digest(data: &[u8]) -> String {
    let hex: String = Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}
