//! A kubelet's side of CRI, over containerd's socket: pods, their containers, logs and statistics.
//!
//! A [`Pod`] is stopped and removed with its handle, and its containers with it, as a kubelet does.

use std::fs;
use std::future::Future;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Code, Response, Status};
use k8s_cri::v1 as cri;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::runtime::Runtime;

use super::containerd::Containerd;
use super::node::Node;
use super::{SOON, guests, image, wait};

/// The image that a pod's sandbox is said to need; it is never run.
pub const PAUSE: &str = "test.local/pause:latest";
/// Where CRI keeps its images and containers.
pub const NAMESPACE: &str = "k8s.io";
/// The RuntimeClass's handler.
const HANDLER: &str = "wasmtime";

static NEXT: AtomicU32 = AtomicU32::new(1);

/// A connection to the CRI of one containerd.
pub struct Kubelet<'a> {
    pub containerd: &'a Containerd,
    runtime: Runtime,
    channel: Channel,
}

impl<'a> Kubelet<'a> {
    /// Connects, and brings the images of sandbox and guests.
    pub fn connect(containerd: &'a Containerd) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let channel = runtime.block_on(containerd_client::connect(containerd.socket()))?;
        let kubelet = Self { containerd, runtime, channel };
        let hello = guests::built("hello.wasm")?;
        // Another runtime's pods, in the benches, do run it.
        let pause = image::pack(
            "pause",
            &[&hello],
            &[
                "--file=/bin/busybox:/bin/busybox",
                "--entrypoint=/bin/busybox",
                "--entrypoint=sleep",
                "--entrypoint=999999",
            ],
        )?;
        kubelet.import(PAUSE, &pause)?;
        kubelet.import(image::GUESTS, &image::guests()?)?;
        Ok(kubelet)
    }

    pub fn node(&self) -> Result<&'a Node> {
        self.containerd.node().context("this containerd makes no pods")
    }

    /// Imports an image and waits until CRI knows it.
    pub fn import(&self, reference: &str, tar: &std::path::Path) -> Result<()> {
        self.containerd.namespace(NAMESPACE).import(reference, tar)?;
        self.knows(reference)
    }

    /// Waits until CRI has heard of an image.
    pub fn knows(&self, reference: &str) -> Result<()> {
        wait::until_true(&format!("CRI to know {reference}"), SOON, || {
            let image = Some(cri::ImageSpec { image: reference.to_owned(), ..Default::default() });
            let request = cri::ImageStatusRequest { image, verbose: false };
            Ok(self.call("ImageStatus", self.images().image_status(request))?.image.is_some())
        })
    }

    /// A pod's configuration, to be changed before it is run.
    pub fn pod(&self, name: &str) -> Result<cri::PodSandboxConfig> {
        let uid = format!("{name}-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let logs = self.containerd.folder().join("pods").join(&uid);
        fs::create_dir_all(&logs)?;
        Ok(cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: name.to_owned(),
                uid,
                namespace: "shop".into(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: logs.display().to_string(),
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces(cri::NamespaceMode::Pod)),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    /// RunPodSandbox.
    pub fn run(&self, config: cri::PodSandboxConfig) -> Result<Pod<'_>> {
        self.run_with(config, HANDLER)
    }

    /// RunPodSandbox of another RuntimeClass.
    pub fn run_with(&self, config: cri::PodSandboxConfig, handler: &str) -> Result<Pod<'_>> {
        let request = cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
        let id = self.call("RunPodSandbox", self.runtime_service().run_pod_sandbox(request))?.pod_sandbox_id;
        Ok(Pod { kubelet: self, id, config })
    }

    /// A pod that was run through another connection.
    pub fn adopt(&self, pod: &Pod<'_>) -> Result<Pod<'_>> {
        Ok(Pod { kubelet: self, id: pod.id.clone(), config: pod.config.clone() })
    }

    pub fn pods(&self) -> Result<Vec<cri::PodSandbox>> {
        let request = cri::ListPodSandboxRequest::default();
        Ok(self.call("ListPodSandbox", self.runtime_service().list_pod_sandbox(request))?.items)
    }

    pub fn runtime_service(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }

    fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    pub fn call<T>(&self, what: &str, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T> {
        let answer = self.runtime.block_on(async { tokio::time::timeout(SOON, call).await });
        Ok(answer.with_context(|| format!("{what}: no answer"))?.with_context(|| what.to_owned())?.into_inner())
    }
}

/// What a kubelet asks for unless a pod says otherwise.
fn namespaces(network: cri::NamespaceMode) -> cri::NamespaceOption {
    cri::NamespaceOption {
        network: network.into(),
        ipc: cri::NamespaceMode::Pod.into(),
        pid: cri::NamespaceMode::Container.into(),
        ..Default::default()
    }
}

/// The pod shares the node's network.
pub fn on_host_network(config: &mut cri::PodSandboxConfig) {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().namespace_options = Some(namespaces(cri::NamespaceMode::Node));
}

/// A container of such a pod.
pub fn on_host_network_too(config: &mut cri::ContainerConfig) {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().namespace_options = Some(namespaces(cri::NamespaceMode::Node));
}

pub fn variable(key: &str, value: &str) -> cri::KeyValue {
    cri::KeyValue { key: key.to_owned(), value: value.to_owned() }
}

/// A pod. Dropped, it is stopped and removed.
pub struct Pod<'a> {
    pub kubelet: &'a Kubelet<'a>,
    pub id: String,
    pub config: cri::PodSandboxConfig,
}

impl<'a> Pod<'a> {
    pub fn status(&self) -> Result<cri::PodSandboxStatus> {
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        let status =
            self.kubelet.call("PodSandboxStatus", self.kubelet.runtime_service().pod_sandbox_status(request))?;
        status.status.context("no status")
    }

    pub fn is_ready(&self) -> Result<bool> {
        Ok(self.status()?.state() == cri::PodSandboxState::SandboxReady)
    }

    /// Its address.
    pub fn ip(&self) -> Result<IpAddr> {
        Ok(self.status()?.network.context("no network")?.ip.parse()?)
    }

    /// PodSandboxStats; `None` from containerd 1.6, which has none.
    pub fn stats(&self) -> Result<Option<cri::PodSandboxStats>> {
        let request = cri::PodSandboxStatsRequest { pod_sandbox_id: self.id.clone() };
        let mut service = self.kubelet.runtime_service();
        match self.kubelet.call("PodSandboxStats", service.pod_sandbox_stats(request)) {
            Ok(answer) => answer.stats.context("no statistics").map(Some),
            Err(error) if error.downcast_ref::<Status>().map(Status::code) == Some(Code::Unimplemented) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The pid of its sandbox, as containerd was told.
    pub fn pid(&self) -> Result<u32> {
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: true };
        let status =
            self.kubelet.call("PodSandboxStatus", self.kubelet.runtime_service().pod_sandbox_status(request))?;
        let info: serde_json::Value = serde_json::from_str(status.info.get("info").context("no info")?)?;
        Ok(u32::try_from(info["pid"].as_u64().context("no pid")?)?)
    }

    /// CreateContainer of a guest in the image of all guests; `change` has the last word on its configuration.
    pub fn guest(
        &self,
        name: &str,
        words: &[&str],
        change: impl FnOnce(&mut cri::ContainerConfig),
    ) -> Result<PodContainer<'_>> {
        self.container(name, image::GUESTS, words, change)
    }

    /// CreateContainer.
    pub fn container(
        &self,
        name: &str,
        image: &str,
        words: &[&str],
        change: impl FnOnce(&mut cri::ContainerConfig),
    ) -> Result<PodContainer<'_>> {
        let mut config = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(cri::ImageSpec { image: image.to_owned(), ..Default::default() }),
            command: words.iter().map(|&word| word.to_owned()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(cri::LinuxContainerConfig {
                security_context: Some(cri::LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces(cri::NamespaceMode::Pod)),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        let log = PathBuf::from(&self.config.log_directory).join(&config.log_path);
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let id = self.kubelet.call("CreateContainer", self.kubelet.runtime_service().create_container(request))?;
        Ok(PodContainer { kubelet: self.kubelet, id: id.container_id, log })
    }

    /// A container that serves, started, with these settings (`SOCKET_ADDR` and so on).
    pub fn web(&self, name: &str, settings: &[(&str, &str)]) -> Result<PodContainer<'_>> {
        let container = self.guest(name, &[super::site::WEB], |config| {
            config.envs = settings
                .iter()
                .map(|(key, value)| cri::KeyValue {
                    key: format!("{}{key}", super::site::PREFIX),
                    value: (*value).to_owned(),
                })
                .collect();
        })?;
        container.start()?;
        Ok(container)
    }

    /// StopPodSandbox.
    pub fn stop(&self) -> Result<()> {
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.kubelet.call("StopPodSandbox", self.kubelet.runtime_service().stop_pod_sandbox(request)).map(drop)
    }

    /// StopPodSandbox, RemovePodSandbox.
    pub fn remove(self) -> Result<()> {
        self.remove_now()
    }

    fn remove_now(&self) -> Result<()> {
        self.stop()?;
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.kubelet.call("RemovePodSandbox", self.kubelet.runtime_service().remove_pod_sandbox(request)).map(drop)
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // Removed already, or what is left shows when containerd is closed.
        let _ = self.remove_now();
    }
}

/// A container of a pod; removed with it.
pub struct PodContainer<'a> {
    kubelet: &'a Kubelet<'a>,
    pub id: String,
    log: PathBuf,
}

impl PodContainer<'_> {
    pub fn start(&self) -> Result<()> {
        let request = cri::StartContainerRequest { container_id: self.id.clone() };
        self.kubelet.call("StartContainer", self.kubelet.runtime_service().start_container(request)).map(drop)
    }

    pub fn status(&self) -> Result<cri::ContainerStatus> {
        let request = cri::ContainerStatusRequest { container_id: self.id.clone(), verbose: false };
        let answer = self.kubelet.call("ContainerStatus", self.kubelet.runtime_service().container_status(request))?;
        answer.status.context("no status")
    }

    /// Waits for its end.
    pub fn ended(&self) -> Result<cri::ContainerStatus> {
        wait::until(&format!("container {} to end", self.id), SOON, || {
            let status = self.status()?;
            Ok((status.state() == cri::ContainerState::ContainerExited).then_some(status))
        })
    }

    /// Waits for its end, which must have this code; tells what it wrote.
    pub fn expect(&self, code: i32) -> Result<String> {
        let status = self.ended()?;
        let log = self.log()?;
        ensure!(status.exit_code == code, "expected code {code}, got {status:?}: {log}");
        Ok(log)
    }

    /// StopContainer with a grace period.
    pub fn stop(&self, grace: Duration) -> Result<()> {
        let timeout = i64::try_from(grace.as_secs())?;
        let request = cri::StopContainerRequest { container_id: self.id.clone(), timeout };
        self.kubelet.call("StopContainer", self.kubelet.runtime_service().stop_container(request)).map(drop)
    }

    pub fn remove(&self) -> Result<()> {
        let request = cri::RemoveContainerRequest { container_id: self.id.clone() };
        self.kubelet.call("RemoveContainer", self.kubelet.runtime_service().remove_container(request)).map(drop)
    }

    pub fn stats(&self) -> Result<cri::ContainerStats> {
        let request = cri::ContainerStatsRequest { container_id: self.id.clone() };
        let answer = self.kubelet.call("ContainerStats", self.kubelet.runtime_service().container_stats(request))?;
        answer.stats.context("no statistics")
    }

    /// UpdateContainerResources.
    pub fn update(&self, resources: cri::LinuxContainerResources) -> Result<()> {
        let request = cri::UpdateContainerResourcesRequest {
            container_id: self.id.clone(),
            linux: Some(resources),
            ..Default::default()
        };
        let mut service = self.kubelet.runtime_service();
        self.kubelet.call("UpdateContainerResources", service.update_container_resources(request)).map(drop)
    }

    /// What it wrote so far: the texts of CRI's log file, without times and streams.
    pub fn log(&self) -> Result<String> {
        let text = match fs::read_to_string(&self.log) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
            text => text.with_context(|| self.log.display().to_string())?,
        };
        Ok(text
            .lines()
            .filter_map(|line| line.splitn(4, ' ').nth(3))
            .fold(String::new(), |all, line| all + line + "\n"))
    }

    /// Waits until its log says this.
    pub fn wait_log(&self, text: &str) -> Result<String> {
        wait::until(&format!("{text:?} in the log of {}", self.id), SOON, || {
            let log = self.log()?;
            Ok(log.contains(text).then_some(log))
        })
        .with_context(|| format!("the log is {:?}", self.log()))
    }
}
