//! A bundle, a containerd that is only bytes, and a way to end every daemon a test has launched.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use containerd_shim::bootstrap::{BootstrapParams, BootstrapResult, Extension};
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::protobuf::{CodedOutputStream, Message as _};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

pub const BINARY: &str = env!("CARGO_BIN_EXE_containerd-shim-wasmtime-v1");
pub const NAMESPACE: &str = "edge-test";
const TTRPC: &str = "/nowhere/containerd.sock.ttrpc";

/// One test's own world. Dropping it ends the daemons that were seen by [`Node::pid`] or listen in its directory.
pub struct Node {
    pub dir: tempfile::TempDir,
    /// Sockets outside `dir`, of the protocols that have no `socket_dir`.
    legacy: std::cell::RefCell<Vec<PathBuf>>,
}

impl Node {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("t").tempdir().unwrap();
        Self { dir, legacy: Default::default() }
    }

    pub fn bundle(&self, id: &str) -> PathBuf {
        self.bundle_with(id, serde_json::json!({}))
    }

    pub fn bundle_with(&self, id: &str, annotations: serde_json::Value) -> PathBuf {
        let bundle = self.dir.path().join("b").join(id);
        fs::create_dir_all(&bundle).unwrap();
        let spec = serde_json::json!({"ociVersion": "1.1.0", "annotations": annotations});
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    pub fn socket_dir(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// A containerd of its own: it has its own groups even where the socket directory is the machine's.
    pub fn containerd(&self) -> String {
        self.dir.path().join("containerd.sock").display().to_string()
    }

    /// The binary as containerd runs it: the flags every version passes, the bundle as working directory.
    pub fn command(&self, id: &str, verb: &str) -> Command {
        let mut command = Command::new(BINARY);
        command.args(["-namespace", NAMESPACE, "-address", &self.containerd()]);
        command.args(["-publish-binary", "/usr/bin/containerd", "-id", id, verb]);
        command.env_remove("MAX_SHIM_VERSION").env_remove("TTRPC_ADDRESS").env_remove("GRPC_ADDRESS");
        command.current_dir(self.dir.path().join("b").join(id));
        command
    }

    /// `start` as containerd 1.6 (`max` is none) to 2.2 runs it.
    pub fn start_legacy(&self, id: &str, max: Option<&str>, stdin: &[u8]) -> Output {
        let mut command = self.command(id, "start");
        command.env("TTRPC_ADDRESS", TTRPC);
        if let Some(max) = max {
            command.env("MAX_SHIM_VERSION", max).env("GRPC_ADDRESS", self.containerd()).env("NAMESPACE", NAMESPACE);
        }
        run(command, stdin)
    }

    /// `start` as containerd 2.3 runs it, with TOML for the runtime options.
    pub fn start(&self, id: &str, toml: &str) -> Output {
        run(self.command(id, "start"), &self.params(id, toml).write_to_bytes().unwrap())
    }

    pub fn params(&self, id: &str, toml: &str) -> BootstrapParams {
        let options = Extension { value: Some(runtime_options("", toml)).into(), ..Default::default() };
        BootstrapParams {
            instance_id: id.into(),
            namespace: NAMESPACE.into(),
            containerd_version: "v2.3.0".into(),
            containerd_ttrpc_address: TTRPC.into(),
            containerd_grpc_address: self.containerd(),
            containerd_binary: "/usr/bin/containerd".into(),
            socket_dir: Some(self.socket_dir().display().to_string()),
            extensions: if toml.is_empty() { Vec::new() } else { vec![options] },
            ..Default::default()
        }
    }

    /// The socket in a good reply of `start`.
    pub fn started(&self, id: &str, toml: &str) -> PathBuf {
        self.socket(&reply(&self.start(id, toml)).address)
    }

    pub fn socket(&self, address: &str) -> PathBuf {
        let socket = PathBuf::from(address.strip_prefix("unix://").unwrap());
        self.legacy.borrow_mut().push(socket.clone());
        socket
    }

    pub fn sockets(&self) -> usize {
        fs::read_dir(self.socket_dir()).map(Iterator::count).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let mine = fs::read_dir(self.socket_dir()).into_iter().flatten().flatten().map(|entry| entry.path());
        for socket in mine.chain(self.legacy.take()) {
            if let Some(pid) = daemon_of(&socket) {
                end(pid);
            }
            let _ = fs::remove_file(socket);
        }
    }
}

/// The process that listens, if it is a daemon of ours.
pub fn daemon_of(socket: &Path) -> Option<Pid> {
    let pid = rustix::net::sockopt::socket_peercred(UnixStream::connect(socket).ok()?).ok()?.pid;
    let command_line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
    command_line.split(|byte| *byte == 0).any(|argument| argument == b"serve").then_some(pid)
}

pub fn end(pid: Pid) {
    let _ = kill_process(pid, Signal::KILL);
    let deadline = Instant::now() + Duration::from_secs(5);
    while is_running(pid) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Not a zombie: nobody may reap orphans where the tests run.
fn is_running(pid: Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    test_kill_process(pid).is_ok() && !status.contains(") Z ")
}

pub fn run(mut command: Command, stdin: &[u8]) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // Some verbs never read it.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    child.wait_with_output().unwrap()
}

/// What a successful verb printed. Anything on stderr would have corrupted the reply.
pub fn stdout(output: &Output) -> &[u8] {
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(output.status.success(), "{:?}", output.status);
    &output.stdout
}

pub fn reply(output: &Output) -> BootstrapResult {
    BootstrapResult::parse_from_bytes(stdout(output)).unwrap()
}

/// What a failed verb printed: one line, and nothing on stdout.
pub fn failure(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(output.stdout.is_empty());
    assert_eq!(text.matches('\n').count(), 1, "{text}");
    text
}

/// The options as containerd sends them: `[...runtimes.wasm.options]` as text, or the path of a file.
pub fn runtime_options(path: &str, body: &str) -> Any {
    let mut value = Vec::new();
    let mut out = CodedOutputStream::vec(&mut value);
    out.write_string(2, path).unwrap();
    out.write_string(3, body).unwrap();
    out.flush().unwrap();
    drop(out);
    Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Default::default() }
}
