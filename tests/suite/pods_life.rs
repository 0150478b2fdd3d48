//! The whole life of a pod, as a kubelet leads it: an init container, a wasm server with volumes, a Linux sidecar.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_cri::v1 as cri;

use super::pods::{addr, expect_empty, get};
use crate::common::containerd::Containerd;
use crate::common::cri::{Kubelet, Pod, PodContainer};
use crate::common::http::{self, Protocol};
use crate::common::{Outcome, guests, image, proc, site};

pub const CASES: crate::common::Cases =
    &[("a_pod_with_an_init_container_a_server_and_a_sidecar", life), ("two_pods_reach_nothing_of_each_other", apart)];

const BUSYBOX: &str = "test.local/busybox:latest";

/// An ordinary Linux image.
fn busybox(kubelet: &Kubelet<'_>) -> Outcome {
    let found = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    let file = format!("{}:/bin/busybox", found.context("no busybox; install busybox-static")?);
    // The builder packs wasm; a module more does no harm.
    let tar = image::pack("busybox", &[&guests::built("hello.wasm")?], &["--file", &file])?;
    kubelet.import(BUSYBOX, &tar)
}

fn shell<'a>(pod: &'a Pod<'_>, name: &str, line: &str, mounts: Vec<cri::Mount>) -> Result<PodContainer<'a>> {
    pod.container(name, BUSYBOX, &["/bin/busybox", "sh", "-c", line], |config| config.mounts = mounts)
}

fn mount(host: &Path, container: &str, readonly: bool) -> cri::Mount {
    cri::Mount {
        container_path: container.to_owned(),
        host_path: host.display().to_string(),
        readonly,
        ..Default::default()
    }
}

fn life(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    busybox(&kubelet)?;
    let data = containerd.folder().join("life");
    fs::create_dir_all(&data)?;
    let pod = kubelet.run(kubelet.pod("life")?)?;
    // The init container: a Linux program that makes what the server serves.
    let init = shell(&pod, "init", "echo made by init > /data/page", vec![mount(&data, "/data", false)])?;
    init.start()?;
    init.expect(0)?;
    // The server: wasm, which may read that and not write it.
    let server = pod.guest("server", &[site::WEB], |config| config.mounts = vec![mount(&data, "/data", true)])?;
    server.start()?;
    get(&kubelet, addr(&pod, 8080)?, "/file?path=/data/page")?.expect(200, "made by init\n")?;
    // The sidecar: it shares the server's loopback, its hostname and nothing of its files.
    let sidecar = shell(
        &pod,
        "sidecar",
        "/bin/busybox wget -q -O - http://127.0.0.1:8080/hello; /bin/busybox hostname; trap 'exit 3' TERM; \
         while :; do /bin/busybox sleep 1 & wait $!; done",
        Vec::new(),
    )?;
    sidecar.start()?;
    sidecar.wait_log("hello\nlife\n")?;
    let inside = exec(&kubelet, &sidecar, &["/bin/busybox", "ls", "/data"])?;
    ensure!(inside.exit_code == 1, "{inside:?}");
    let inside = exec(&kubelet, &sidecar, &["/bin/busybox", "echo", "exec"])?;
    ensure!(inside.exit_code == 0 && inside.stdout == b"exec\n", "{inside:?}");
    // Of each there are statistics.
    for container in [&server, &sidecar] {
        let memory = container.stats()?.memory.and_then(|memory| memory.working_set_bytes);
        ensure!(memory.is_some(), "{:?}", container.stats()?);
    }
    drain(&kubelet, &pod, &server)?;
    sidecar.stop(Duration::from_secs(10))?;
    ensure!(sidecar.status()?.exit_code == 3, "{:?}", sidecar.status()?);
    for container in [init, server, sidecar] {
        container.remove()?;
    }
    let daemon = proc::group_leader(pod.pid()?)?;
    pod.remove()?;
    ensure!(children(daemon)?.is_empty(), "processes are left: {:?}", children(daemon)?);
    expect_empty(&kubelet)
}

/// Stopped with requests in flight, the server answers them all.
fn drain(kubelet: &Kubelet<'_>, pod: &Pod<'_>, server: &PodContainer<'_>) -> Outcome {
    const CLIENTS: usize = 8;
    let (at, node) = (addr(pod, 8080)?, kubelet.node()?);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                scope
                    .spawn(move || node.inside(|| http::block_on(http::get(at, Protocol::One, "/sleep?ms=700&say=in"))))
            })
            .collect();
        crate::common::wait::until_true("all requests to have begun", crate::common::SOON, || {
            Ok(server.log()?.matches("in\n").count() == CLIENTS)
        })?;
        server.stop(Duration::from_secs(10))?;
        clients.into_iter().try_for_each(|client| {
            let answer = client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
            ensure!(answer.status == 200, "{answer:?}");
            Ok(())
        })
    })?;
    ensure!(server.status()?.exit_code == 0, "{:?}", server.status()?);
    Ok(())
}

fn exec(kubelet: &Kubelet<'_>, container: &PodContainer<'_>, words: &[&str]) -> Result<cri::ExecSyncResponse> {
    let request = cri::ExecSyncRequest {
        container_id: container.id.clone(),
        cmd: words.iter().map(|&word| word.to_owned()).collect(),
        timeout: 10,
    };
    kubelet.call("ExecSync", kubelet.runtime_service().exec_sync(request))
}

/// Processes that a daemon would have to reap.
fn children(daemon: u32) -> Result<Vec<u32>> {
    let of = |pid: u32| -> Option<u32> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
    };
    Ok(proc::pids().into_iter().filter(|pid| of(*pid) == Some(daemon)).collect())
}

/// Two pods of one process: neither files nor variables nor sockets of one are the other's.
fn apart(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let mut pods = Vec::new();
    for name in ["one", "two"] {
        let folder = containerd.folder().join(format!("apart-{name}"));
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("secret"), format!("of {name}"))?;
        pods.push((kubelet.run(kubelet.pod(name)?)?, folder));
    }
    for ((pod, folder), other) in pods.iter().zip(["two", "one"]) {
        let name = &pod.config.hostname;
        let mounts = vec![mount(folder, &format!("/{name}"), false)];
        let run = |verb: &str, words: &[&str], code: i32| -> Result<String> {
            let container = pod.guest(&format!("{verb}-{name}"), words, |config| {
                config.mounts = mounts.clone();
                config.envs = vec![crate::common::cri::variable("WHOSE", name)];
            })?;
            container.start()?;
            container.expect(code)
        };
        ensure!(run("own", &["/kit.wasm", "read", &format!("/{name}/secret")], 0)?.trim() == format!("of {name}"));
        run("others", &["/kit.wasm", "read", &format!("/{other}/secret")], 1)?;
        run("up", &["/kit.wasm", "read", &format!("/{name}/../../apart-{other}/secret")], 1)?;
        let variables = run("env", &["/kit.wasm", "env"], 0)?;
        ensure!(variables.contains(&format!("WHOSE={name}")) && !variables.contains(other), "{variables}");
    }
    for (pod, _) in pods {
        pod.remove()?;
    }
    expect_empty(&kubelet)
}
