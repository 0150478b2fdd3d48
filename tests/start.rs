//! `start`, `delete`, `-info` and `-v` of the real binary, fed with what each containerd sends. No containerd runs here.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says what it expects by failing")]

#[path = "start/support.rs"]
mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim::api::{DeleteRequest, DeleteResponse, Empty, KillRequest, Options as RuncOptions};
use containerd_shim::protos::protobuf::Message as _;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::shim_sync::{Task, create_task};
use containerd_shim::protos::ttrpc::{self, Server, TtrpcContext};
use containerd_shim::protos::types::introspection::RuntimeInfo;
use support::{BINARY, NAMESPACE, Node, daemon_of, end, failure, reply, run, runtime_options, stdout};

fn runc_options() -> Any {
    let value = RuncOptions { binary_name: "crun".into(), systemd_cgroup: true, ..Default::default() };
    Any { type_url: "containerd.runc.v1.Options".into(), value: value.write_to_bytes().unwrap(), ..Default::default() }
}

#[test]
fn containerd_1_6_gets_the_plain_address() {
    let node = Node::new();
    let bundle = node.bundle("a");
    for stdin in [Vec::new(), runc_options().write_to_bytes().unwrap()] {
        let output = node.start_legacy("a", None, &stdin);
        let address = String::from_utf8(stdout(&output).to_vec()).unwrap();
        let socket = node.socket(&address);
        assert_eq!(socket.parent(), Some(Path::new("/run/containerd/s")));
        assert_eq!(socket.file_name().unwrap().len(), 64);
        assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
        assert!(daemon_of(&socket).is_some());
    }
}

#[test]
fn containerd_1_7_to_2_2_get_json_of_version_2() {
    let node = Node::new();
    node.bundle("a");
    for max in ["2", "3"] {
        let stdin = runtime_options("", "idle_timeout = \"5s\"").write_to_bytes().unwrap();
        let output = node.start_legacy("a", Some(max), &stdin);
        let json: serde_json::Value = serde_json::from_slice(stdout(&output)).unwrap();
        assert_eq!((&json["version"], &json["protocol"]), (&2.into(), &"ttrpc".into()));
        assert!(daemon_of(&node.socket(json["address"].as_str().unwrap())).is_some());
    }
}

#[test]
fn containerd_2_3_gets_a_bootstrap_result() {
    let node = Node::new();
    node.bundle("a");
    let result = reply(&node.start("a", ""));
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    let socket = node.socket(&result.address);
    assert_eq!(socket.parent(), Some(node.socket_dir().as_path()));
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn the_daemon_keeps_nothing_of_its_launch() {
    let node = Node::new();
    node.bundle("a");
    let mut command = node.command("a", "start");
    command.env("SECRET", "hunter2");
    let socket = node.socket(&reply(&run(command, &node.params("a", "").write_to_bytes().unwrap())).address);
    let pid = daemon_of(&socket).unwrap().as_raw_nonzero();
    let proc = |name: &str| PathBuf::from(format!("/proc/{pid}/{name}"));
    let environment = String::from_utf8(fs::read(proc("environ")).unwrap()).unwrap();
    assert!(environment.split('\0').all(|entry| entry.is_empty() || entry.starts_with("PATH=")), "{environment}");
    assert_eq!(fs::read_link(proc("cwd")).unwrap(), Path::new("/"));
    for fd in 0..3 {
        assert_eq!(fs::read_link(proc(&format!("fd/{fd}"))).unwrap(), Path::new("/dev/null"), "fd {fd}");
    }
    let stat = fs::read_to_string(proc("stat")).unwrap();
    let session = stat.rsplit(") ").next().unwrap().split(' ').nth(3).unwrap().to_owned();
    assert_eq!(session, pid.to_string(), "a session of its own");
}

#[test]
fn params_for_another_container_are_refused() {
    let node = Node::new();
    node.bundle("a");
    let output = run(node.command("a", "start"), &node.params("b", "").write_to_bytes().unwrap());
    assert!(failure(&output).contains("edge-test/b"));
}

#[test]
fn wrong_options_are_told_all_at_once_and_launch_nothing() {
    let node = Node::new();
    node.bundle("a");
    let text = failure(&node.start("a", "idle_timeout = 5\ncolour = 1\ngroup = \"town\""));
    for part in ["`idle_timeout`", "`colour` is unknown", "known are group, cache_dir", "\"town\""] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(failure(&node.start("a", "group = ")).contains("not valid TOML"));
    let missing = runtime_options("/nowhere/x.toml", "").write_to_bytes().unwrap();
    assert!(failure(&node.start_legacy("a", Some("2"), &missing)).contains("/nowhere/x.toml"));
    assert!(failure(&node.start_legacy("a", None, b"\xff\xfe")).contains("neither runtime options"));
    assert_eq!(node.sockets(), 0);
}

#[test]
fn a_bundle_without_a_good_spec_is_refused() {
    let node = Node::new();
    let spec = node.bundle("a").join("config.json");
    fs::write(&spec, "{").unwrap();
    assert!(failure(&node.start("a", "")).contains("not a valid OCI runtime spec"));
    fs::remove_file(&spec).unwrap();
    assert!(failure(&node.start("a", "")).contains("no such file"));
    assert_eq!(node.sockets(), 0);
}

#[test]
fn a_group_shares_one_daemon_and_others_do_not() {
    let node = Node::new();
    let pod = |id: &str, namespace: &str| {
        serde_json::json!({"io.kubernetes.cri.sandbox-id": id, "io.kubernetes.cri.sandbox-namespace": namespace,
            "io.kubernetes.cri.container-type": "sandbox"})
    };
    for (id, namespace) in [("p1", "shop"), ("p2", "shop"), ("p3", "bank")] {
        node.bundle_with(id, pod(id, namespace));
    }
    let shop = node.started("p1", "");
    assert_eq!(shop, node.started("p2", ""));
    assert_ne!(shop, node.started("p3", ""));
    assert_ne!(node.started("p1", "group = \"pod\""), node.started("p2", "group = \"pod\""));
    assert_eq!(node.started("p1", "group = \"node\""), node.started("p3", "group = \"node\""));
}

#[test]
fn members_of_a_pod_follow_their_sandbox_whatever_they_say() {
    let node = Node::new();
    let annotations = |kind: &str, group: &str| {
        serde_json::json!({"io.kubernetes.cri.sandbox-id": "p", "io.kubernetes.cri.container-type": kind,
            "troupe.dev/group": group})
    };
    node.bundle_with("p", annotations("sandbox", "pod"));
    node.bundle_with("c", annotations("container", "node"));
    let sandbox = node.started("p", "");
    assert_eq!(sandbox, node.started("c", "idle_timeout = \"9s\""));
    end(daemon_of(&sandbox).unwrap());
    assert_ne!(sandbox, node.started("c", ""), "nothing to follow any more");
}

#[test]
fn two_and_twenty_starts_at_once_give_one_daemon() {
    for count in [2, 20] {
        let node = Node::new();
        let ids: Vec<String> = (0..count).map(|n| format!("c{n}")).collect();
        ids.iter().for_each(|id| drop(node.bundle(id)));
        let children: Vec<_> = ids
            .iter()
            .map(|id| (node.command(id, "start"), node.params(id, "").write_to_bytes().unwrap()))
            .map(|(command, stdin)| thread::spawn(move || run(command, &stdin)))
            .collect();
        let mut sockets: Vec<_> =
            children.into_iter().map(|child| node.socket(&reply(&child.join().unwrap()).address)).collect();
        sockets.dedup();
        assert_eq!(sockets.len(), 1, "{count}");
        assert_eq!(daemons_with(&sockets[0]), 1, "{count}");
    }
}

/// Counts the processes that were launched for a socket, whether they got it or not.
fn daemons_with(socket: &Path) -> usize {
    let needle = socket.display().to_string();
    let of = |entry: fs::DirEntry| fs::read(entry.path().join("cmdline")).unwrap_or_default();
    fs::read_dir("/proc").unwrap().flatten().map(of).filter(|line| contains(line, &needle)).count()
}

fn contains(line: &[u8], needle: &str) -> bool {
    line.windows(needle.len()).any(|window| window == needle.as_bytes())
}

#[test]
fn a_killed_daemon_is_replaced_at_the_same_address() {
    let node = Node::new();
    node.bundle("a");
    let socket = node.started("a", "");
    let first = daemon_of(&socket).unwrap();
    end(first);
    assert!(socket.exists(), "stale");
    assert_eq!(node.started("a", ""), socket);
    let second = daemon_of(&socket).unwrap();
    assert_ne!(first, second);
    assert_eq!(node.sockets(), 1);
}

#[test]
fn what_is_not_a_socket_is_never_removed() {
    let node = Node::new();
    node.bundle("a");
    let socket = node.started("a", "");
    end(daemon_of(&socket).unwrap());
    fs::remove_file(&socket).unwrap();
    fs::write(&socket, "precious").unwrap();
    assert!(failure(&node.start("a", "")).contains("is not a socket"));
    assert_eq!(fs::read_to_string(&socket).unwrap(), "precious");
}

#[test]
fn a_long_socket_directory_is_refused() {
    let node = Node::new();
    node.bundle("a");
    let mut params = node.params("a", "");
    params.socket_dir = Some(node.dir.path().join("x".repeat(80)).display().to_string());
    let output = run(node.command("a", "start"), &params.write_to_bytes().unwrap());
    assert!(failure(&output).contains("shorter state directory"));
}

/// A daemon that only remembers what it was asked.
#[derive(Default)]
struct Recorder {
    calls: Mutex<Vec<String>>,
}

impl Recorder {
    fn note(&self, context: &TtrpcContext, call: String) -> usize {
        let namespace = context.metadata["containerd-namespace-ttrpc"].join(",");
        let mut calls = self.calls.lock().unwrap();
        calls.push(format!("{namespace} {call}"));
        calls.len()
    }
}

impl Task for Recorder {
    fn kill(&self, context: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.note(context, format!("kill {} {}", request.id, request.signal));
        Ok(Empty::new())
    }

    fn delete(&self, context: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        // The first answer is the one of a container that is still on its way out.
        if self.note(context, format!("delete {}", request.id)) < 3 {
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::FAILED_PRECONDITION, "running")));
        }
        Ok(DeleteResponse { exit_status: 42, ..Default::default() })
    }
}

fn delete(node: &Node, id: &str) -> DeleteResponse {
    let before = Instant::now();
    let output = run(node.command(id, "delete"), b"");
    assert!(before.elapsed() < Duration::from_secs(5), "{:?}", before.elapsed());
    DeleteResponse::parse_from_bytes(stdout(&output)).unwrap()
}

#[test]
fn delete_ends_the_container_in_a_living_daemon_and_tells_its_exit() {
    let node = Node::new();
    let bundle = node.bundle("a");
    let address = format!("unix://{}", node.dir.path().join("fake").display());
    let recorder = Arc::new(Recorder::default());
    let mut server = Server::new().bind(&address).unwrap().register_service(create_task(recorder.clone()));
    server.start().unwrap();
    fs::write(bundle.join("address"), &address).unwrap();
    assert_eq!(delete(&node, "a").exit_status, 42);
    let calls = recorder.calls.lock().unwrap().clone();
    let expected = ["kill a 9", "delete a", "delete a"].map(|call| format!("{NAMESPACE} {call}"));
    assert_eq!(calls, expected);
    server.shutdown();
}

#[test]
fn delete_answers_in_time_when_the_daemon_does_not() {
    let node = Node::new();
    let bundle = node.bundle("a");
    let socket = node.dir.path().join("mute");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    fs::write(bundle.join("address"), format!("unix://{}", socket.display())).unwrap();
    assert_eq!(delete(&node, "a").exit_status, 137);
    assert!(socket.exists(), "a living daemon keeps its socket");
}

#[test]
fn delete_knows_a_living_daemon_that_never_saw_the_container() {
    let node = Node::new();
    node.bundle("a");
    let socket = node.started("a", "");
    assert_eq!(delete(&node, "a").exit_status, 137);
    assert!(daemon_of(&socket).is_some(), "its other containers live on");
}

#[test]
fn delete_removes_the_socket_of_a_dead_daemon() {
    let node = Node::new();
    node.bundle("a");
    let socket = node.started("a", "");
    end(daemon_of(&socket).unwrap());
    let response = delete(&node, "a");
    assert_eq!(response.exit_status, 137);
    assert!(response.exited_at.seconds > 1_600_000_000);
    assert!(!socket.exists());
}

#[test]
fn delete_works_when_nothing_is_left() {
    let node = Node::new();
    let bundle = node.bundle("a");
    fs::remove_file(bundle.join("config.json")).unwrap();
    assert_eq!(delete(&node, "a").exit_status, 137);
    let mut command = std::process::Command::new(BINARY);
    command.args(["-namespace", NAMESPACE, "-id", "a", "-bundle", "/nowhere/b", "delete"]).current_dir("/");
    assert_eq!(DeleteResponse::parse_from_bytes(stdout(&run(command, b""))).unwrap().exit_status, 137);
}

#[test]
fn delete_lets_a_mounted_root_filesystem_go() {
    let node = Node::new();
    let rootfs = node.bundle("a").join("rootfs");
    fs::create_dir(&rootfs).unwrap();
    let mounted = || fs::read_to_string("/proc/self/mounts").unwrap().contains(&*rootfs.to_string_lossy());
    for _ in 0..2 {
        use rustix::mount::{MountFlags, mount};
        mount("tmpfs", &rootfs, "tmpfs", MountFlags::empty(), None).unwrap();
    }
    assert!(mounted());
    assert_eq!(delete(&node, "a").exit_status, 137);
    assert!(!mounted());
}

#[test]
fn info_and_version_say_what_this_is() {
    let command = |flag: &str| {
        let mut command = std::process::Command::new(BINARY);
        command.arg(flag);
        command
    };
    let input = runc_options().write_to_bytes().unwrap();
    let info = RuntimeInfo::parse_from_bytes(stdout(&run(command("-info"), &input))).unwrap();
    assert_eq!(info.options.as_ref(), Some(&runc_options()));
    assert_eq!(info.annotations["troupe.dev/groups"], "pod,namespace,node");
    for flag in ["-v", "-version"] {
        let text = String::from_utf8(stdout(&run(command(flag), b"")).to_vec()).unwrap();
        assert!(text.starts_with("containerd-shim-wasmtime-v1:\n"), "{text}");
    }
}

#[test]
fn no_verb_and_unknown_verbs_show_the_usage() {
    for args in [&[][..], &["dance"], &["-id", "x"]] {
        let output = std::process::Command::new(BINARY).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(String::from_utf8(output.stderr).unwrap().starts_with("usage:"));
    }
}
