//! What is run of an image that has more than one answer: one of several modules, one of several platforms, text and
//! code that is no wasm; and what the process does for it and no more.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::images::bytes;
use crate::common::api::{Api, INDEX, MANIFEST, WASM, digest};
use crate::common::containerd::Containerd;
use crate::common::{Outcome, base, guests, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("several_modules_are_told_apart", several),
    ("the_platform_is_chosen_through_indexes", platforms),
    ("text_runs_from_every_source", text),
    ("precompiled_code_is_refused_from_every_source", precompiled),
    ("no_root_is_mounted_for_who_cannot_see_it", unmounted),
    ("a_restarted_containerd_is_asked_anew", restarted),
];

fn several(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "artifacts")?;
    let image = "test.local/several:latest";
    let (kit, hello) = (bytes("kit.wasm")?, bytes("exports.wasm")?);
    api.artifact(image, &[("kit.wasm", &kit), ("bin/exports.wasm", &hello), ("", &hello)])?;
    let run = |word: &str| api.container(image, &[word, "exit", "3"]);
    for (word, code, said) in [
        ("/kit.wasm", 3, ""),
        ("kit.wasm", 3, ""),
        ("0", 3, ""),
        ("/bin/exports.wasm", 0, "this is _start\n"),
        // Its folder is in the PATH.
        ("exports.wasm", 0, "this is _start\n"),
        ("exports.wasm#other", 0, "this is other\nexports.wasm#other exit 3\n"),
        ("1#leave", 7, "this is leave\n"),
        ("2", 0, "this is _start\n"),
    ] {
        let output = run(word).expect(code)?;
        ensure!(output == said, "{word}: {output:?}");
    }
    let names = "0 (kit.wasm), 1 (bin/exports.wasm), 2 (without a title)";
    run("/").expect_error(&["3 modules, and the first argument names none", names])?;
    run("/none.wasm").expect_error(&["no module of it is called /none.wasm", names])?;
    run("3").expect_error(&["no module of it is called 3", names])?;
    api.artifact(image, &[("a.wasm", &kit), ("./a.wasm", &hello)])?;
    run("a.wasm").expect_error(&["2 of its modules are called a.wasm; name one by its number", "1 (./a.wasm)"])?;
    run("0").expect(3)?;
    api.client.expect_empty()
}

fn on(descriptor: &Value, os: &str, architecture: &str) -> Value {
    let mut descriptor = descriptor.clone();
    descriptor["platform"] = json!({ "os": os, "architecture": architecture });
    descriptor
}

fn platforms(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "artifacts")?;
    let image = "test.local/platforms:latest";
    let manifest = |guest: &str| api.manifest(vec![api.layer(WASM, guest, &bytes(guest)?)?]);
    let (kit, other) = (manifest("kit.wasm")?, manifest("exports.wasm")?);
    let gone = json!({ "mediaType": MANIFEST, "digest": digest(b"never pulled"), "size": 12 });
    let index = |children: &[&Value]| api.put_json(INDEX, &json!({ "schemaVersion": 2, "manifests": children }));
    let host = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let inner = index(&[&on(&other, "linux", "s390x"), &on(&kit, "wasip1", "wasm")])?;
    for target in [
        index(&[&on(&other, "linux", "s390x"), &on(&kit, "wasi", "wasm")])?,
        index(&[&on(&other, "wasip1", "wasm"), &on(&kit, "linux", host)])?,
        index(&[&on(&gone, "linux", host), &on(&other, "unknown", "unknown"), &kit])?,
        index(&[&inner])?,
        index(&[&index(&[&inner])?])?,
    ] {
        api.name(image, &target)?;
        api.container(image, &["/", "exit", "3"]).expect(3)?;
    }
    api.name(image, &index(&[&on(&gone, "wasip1", "wasm")])?)?;
    api.container(image, &["/"]).expect_error(&["is not in containerd's content store", "--all-platforms"])?;
    api.name(image, &index(&[&on(&kit, "windows", "wasm")])?)?;
    api.container(image, &["/"]).expect_error(&["no root filesystem, and its image no wasm layer"])?;
    api.client.expect_empty()
}

const TEXT: &str = r#";; A comment.
(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1) (func (export "_start") (call $exit (i32.const 5))))"#;

fn text(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "text")?;
    let root = base::folder(&format!("roots/text-{}", containerd.version))?;
    fs::write(root.join("app.wat"), TEXT)?;
    for form in ["/app.wat", "app.wat", "/", "app.wat#_start"] {
        api.client.rootfs(&root, &[form]).expect(5)?;
    }
    api.artifact("test.local/text:latest", &[("app.wat", TEXT.as_bytes())])?;
    api.container("test.local/text:latest", &["app.wat"]).expect(5)?;
    // It is read by a process with limits, and not by the one that holds the containers.
    let neighbour = api.client.guest("/sleeper.wasm", &[])?.detached()?;
    let deep = "(".repeat(1 << 20);
    let large = format!("(module {})", "(func)".repeat(1 << 20));
    let binary = format!(r#"(module binary "\7fELF\02\01\01\c8{}")"#, "\\00".repeat(8));
    for (name, text, words) in [
        ("broken.wat", "(module (func", "not a valid WebAssembly program"),
        ("deep.wat", &deep, "not a valid WebAssembly program"),
        ("large.wat", &large, "/large.wat: "),
        // What text can stand for is as suspect as what it is.
        ("binary.wat", &binary, "precompiled code"),
        ("words.wat", "just words", "is a text file"),
    ] {
        fs::write(root.join(name), text)?;
        api.client.rootfs(&root, &[&format!("/{name}")]).expect_error(words)?;
    }
    ensure!(neighbour.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
    neighbour.delete()?;
    api.client.expect_empty()
}

/// What wasmtime's own compiler writes begins like this.
pub const PRECOMPILED: &[u8] = b"\x7fELF\x02\x01\x01\xc8\0\0\0\0\0\0\0\0\x01\0\xf7\0\x01\0\0\0";

fn precompiled(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "precompiled")?;
    let root = base::folder(&format!("roots/precompiled-{}", containerd.version))?;
    fs::write(root.join("app.cwasm"), PRECOMPILED)?;
    api.client
        .rootfs(&root, &["/app.cwasm"])
        .expect_error("precompiled code (.cwasm). It is machine code that nothing")?;
    let image = "test.local/precompiled:latest";
    for title in ["app.cwasm", "app.wasm", ""] {
        api.artifact(image, &[(title, PRECOMPILED)])?;
        api.container(image, &["/"]).expect_error(&["precompiled code (.cwasm). It is machine code that nothing"])?;
    }
    api.client.expect_empty()
}

/// Mounts that the process of this namespace sees in the bundle of the container.
fn mounts_of(api: &Api<'_>, id: &str) -> Result<usize> {
    let mounts = proc::mounts(&api.client.daemon()?.to_string())?;
    Ok(mounts.iter().filter(|mount| mount.contains(&format!("/{id}/"))).count())
}

fn unmounted(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "unmounted")?;
    let sleeper = guests::compiled_texts()?.into_iter().find(|file| file.ends_with("sleeper.wasm"));
    api.artifact("test.local/blind:latest", &[("", &fs::read(sleeper.unwrap_or_default())?)])?;
    api.artifact("test.local/seeing:latest", &[("", &bytes("kit.wasm")?)])?;
    for (image, has_snapshot, mounts) in
        [("blind", false, 0), ("blind", true, 0), ("seeing", false, 0), ("seeing", true, 2)]
    {
        let plan = api.container(&format!("test.local/{image}:latest"), &["/", "sleep", "0"]);
        let plan = if has_snapshot { plan.snapshot() } else { plan };
        let container = plan.start()?;
        let seen = mounts_of(&api, &plan.id)?;
        ensure!(seen == mounts, "{image}, snapshot {has_snapshot}: {seen} mounts");
        ensure!(container.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
        container.delete()?;
        plan.forget()?;
    }
    api.client.expect_empty()
}

/// No connection is kept that could have died with it.
fn restarted(containerd: &Containerd) -> Outcome {
    let own = Containerd::start(containerd.version, &format!("{}-images", containerd.version))?;
    let again = |api: &Api<'_>| api.container("test.local/again:latest", &["/", "exit", "3"]).expect(3).map(drop);
    let api = Api::connect(&own, "again")?;
    api.artifact("test.local/again:latest", &[("kit.wasm", &bytes("kit.wasm")?)])?;
    let neighbour = api.client.guest("/sleeper.wasm", &[])?.detached()?;
    again(&api)?;
    let daemon = neighbour.daemon()?;
    own.kill()?;
    own.launch()?;
    wait::until_true("the neighbour to be known again", crate::common::SOON, || {
        Ok(neighbour.status()?.as_deref() == Some("RUNNING"))
    })?;
    again(&Api::connect(&own, "again")?)?;
    ensure!(neighbour.daemon()? == daemon, "the process is another one");
    ensure!(neighbour.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
    neighbour.delete()?;
    own.close()
}
