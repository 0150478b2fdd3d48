//! The README's getting-started, word for word: its commands are read from there and run by a shell.
//!
//! ```text
//! README.md ── blocks of "A server in four commands" ──> bash ── cargo, ctr: wrappers that name this build, this containerd
//!                                                              └─ curl: the real one
//! ```
//! They use port 8080 of the host's network, so containerd, shim and shell are in a network of their own. On containerd
//! 1.6 the builder gets the option that the README names for it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use rustix::thread::UnshareFlags;

use crate::common::containerd::Containerd;
use crate::common::job::{self, Job};
use crate::common::{Cases, Outcome, SOON, base, guests, wait};

pub const CASES: Cases = &[("getting_started_with_a_server", getting_started)];

const HEADING: &str = "### A server in four commands";

fn getting_started(containerd: &Containerd) -> Outcome {
    let version = containerd.version;
    // A thread keeps to itself which network it is in; what it starts inherits it.
    let case = thread::spawn(move || {
        enter_a_network()?;
        let containerd = Containerd::start(version, &format!("readme-{version}"))?;
        let outcome = follow(&containerd).with_context(|| containerd.log_since(0));
        outcome.and(containerd.close())
    });
    case.join().map_err(|_| anyhow!("the case panicked"))?
}

/// Makes a network namespace with nothing but `lo`, and moves this thread there.
fn enter_a_network() -> Outcome {
    // SAFETY: only sharing of memory or descriptors with other threads could make it unsafe to leave; a network is neither.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.context("a network needs root")?;
    let mut up = Command::new("busybox");
    up.args(["ip", "link", "set", "lo", "up"]);
    job::run(up, SOON)?.success("ip link set lo up").map(drop)
}

fn follow(containerd: &Containerd) -> Outcome {
    let [serve, ask] = blocks()?;
    for part in [
        "cargo run --bin oci-tar-builder -- --name wasi-http --repo ghcr.io/containerd/runwasi --tag latest",
        "--module wasi-http.wasm -o ./dist/wasi-http-img-oci.tar",
        "ctr image import --all-platforms",
        "ctr run --rm --net-host --runtime=io.containerd.wasmtime.v1",
        "wasi-http /wasi-http.wasm",
    ] {
        ensure!(serve.contains(part), "the README says no longer {part:?}: {serve}");
    }
    ensure!(ask.lines().next() == Some("curl 127.0.0.1:8080"), "{ask}");
    let serve = if containerd.version == "1.6" {
        serve.replace("wasi-http.wasm -o", "wasi-http.wasm --rootfs -o")
    } else {
        serve
    };

    let place = Place::new(containerd)?;
    let offset = containerd.log_length();
    let server = Job::spawn(place.shell(&serve))?;
    let listening = wait::until_true("the server to listen", SOON, || {
        Ok(containerd.whole_log_since(offset).contains(" listening"))
    });
    listening.with_context(|| format!("{}{}", server.stdout.text_so_far(), server.stderr.text_so_far()))?;
    let answer = job::run(place.shell(&ask), SOON)?.success("the README's second block")?;
    ensure!(answer.contains("hello world"), "{answer}");
    server.wait(SOON)?.success("the README's first block").map(drop)
}

/// The two shell blocks below the heading, continued lines joined.
fn blocks() -> Result<[String; 2]> {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md"))?;
    let (_, section) = readme.split_once(HEADING).with_context(|| format!("the README has no {HEADING:?}"))?;
    let mut blocks = section.split("```sh\n").skip(1).map(|rest| {
        let block = rest.split("```").next().unwrap_or_default();
        block.lines().map(str::trim_start).collect::<Vec<_>>().join("\n").replace("\\\n", "")
    });
    Ok([blocks.next().context("no first block")?, blocks.next().context("no second block")?])
}

/// A folder to type the commands in, and a `PATH` for them.
struct Place {
    folder: PathBuf,
    programs: PathBuf,
}

impl Place {
    fn new(containerd: &Containerd) -> Result<Self> {
        let folder = base::folder(&format!("getting-started-{}", containerd.version))?;
        let programs = base::folder(&format!("getting-started-{}/programs", containerd.version))?;
        // Guests where `make guests` puts them.
        let built = guests::built("hello-http.wasm")?;
        fs::create_dir_all(folder.join(".cache/troupe"))?;
        symlink(built.parent().context("no folder")?, folder.join(".cache/troupe/guests"))?;
        let builder = env!("CARGO_BIN_EXE_oci-tar-builder");
        script(
            &programs.join("cargo"),
            &format!(
                "[ \"$1 $2 $3 $4\" = 'run --bin oci-tar-builder --' ] || exit 99; shift 4; exec '{builder}' \"$@\""
            ),
        )?;
        // Nothing of the machine's: the cache and the FIFOs are the test's.
        let ctr = containerd.ctr();
        let words: Vec<String> =
            [ctr.get_program()].into_iter().chain(ctr.get_args()).map(|word| format!("'{}'", word.display())).collect();
        let own = format!(
            "run --runtime-config-path '{}' --fifo-dir '{}'",
            containerd.options().display(),
            containerd.folder().join("fifo").display()
        );
        let ctr = words.join(" ");
        script(
            &programs.join("ctr"),
            &format!("case $1 in run) shift; exec {ctr} {own} \"$@\" ;; *) exec {ctr} \"$@\" ;; esac"),
        )?;
        Ok(Self { folder, programs })
    }

    fn shell(&self, commands: &str) -> Command {
        let path = format!("{}:{}", self.programs.display(), std::env::var("PATH").unwrap_or_default());
        let mut bash = Command::new("bash");
        bash.args(["-eu", "-c", commands]).current_dir(&self.folder).env("PATH", path).env("HOME", &self.folder);
        bash
    }
}

fn script(file: &Path, text: &str) -> Outcome {
    fs::write(file, format!("#!/bin/sh\n{text}\n"))?;
    Ok(fs::set_permissions(file, fs::Permissions::from_mode(0o755))?)
}
