//! Images that lie, and containerds that do not answer. Each has its own clear error, and nothing is left behind.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use containerd_shim_protos::ttrpc::{self, Code};
use serde_json::{Value, json};

use super::images::PRECOMPILED;
use crate::common::api::{Api, INDEX, MANIFEST, WASM, digest};
use crate::common::containerd::Containerd;
use crate::common::shim::{self, Shim, Task, expect_code};
use crate::common::{Outcome, SOON, guests, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("documents_that_lie_are_refused", documents),
    ("layers_that_lie_are_refused", layers),
    ("what_is_damaged_on_disk_is_refused", damaged),
    ("what_is_gone_is_named", gone),
    ("a_module_above_the_limit_is_not_read", too_large),
];

pub const BARE: crate::common::BareCases = &[
    ("files_need_no_grpc", files_need_no_grpc),
    ("a_containerd_that_is_not_there_is_named", absent),
    ("a_containerd_that_hangs_is_given_up", hangs),
    ("a_containerd_that_hangs_up_is_an_error", hangs_up),
    ("a_containerd_that_talks_nonsense_is_an_error", nonsense),
    ("leaving_does_not_wait_for_containerd", leaving),
];

const IMAGE: &str = "test.local/hostile:latest";

/// Runs `act` with a neighbour in the same process; afterwards the process holds what it held before.
fn leaving_nothing(containerd: &Containerd, act: impl FnOnce(&Api<'_>) -> Outcome) -> Outcome {
    let api = Api::connect(containerd, "hostile-images")?;
    let neighbour = api.client.guest("/sleeper.wasm", &[])?.detached()?;
    api.forget(IMAGE)?;
    api.container(IMAGE, &["/"]).expect_error(&["is not in containerd any more"])?;
    let daemon = neighbour.daemon()?;
    let before = proc::holdings(daemon)?;
    act(&api)?;
    let settled = wait::until_true("the shim to let go", SOON, || Ok(proc::holdings(daemon)?.fit_in(before)));
    settled.map_err(|error| error.context(format!("before {before:?}, after {:?}", proc::holdings(daemon))))?;
    ensure!(neighbour.kill_and_wait("SIGKILL")?.0.exit_code() == 137);
    neighbour.delete()?;
    api.client.expect_empty()
}

fn kit() -> Result<Vec<u8>> {
    Ok(fs::read(guests::built("kit.wasm")?)?)
}

fn with(descriptor: &Value, key: &str, value: Value) -> Value {
    let mut descriptor = descriptor.clone();
    descriptor[key] = value;
    descriptor
}

fn documents(containerd: &Containerd) -> Outcome {
    leaving_nothing(containerd, |api| {
        let good = api.manifest(vec![api.layer(WASM, "kit.wasm", &kit()?)?])?;
        let index = |children: &[Value]| api.put_json(INDEX, &json!({ "schemaVersion": 2, "manifests": children }));
        let mut tower = good.clone();
        for _ in 0..6 {
            tower = index(&[tower])?;
        }
        let wide: Vec<_> = (0..200)
            .map(|number| index(&[json!({ "digest": number.to_string(), "size": 1 })]))
            .collect::<Result<_>>()?;
        let config = json!({ "mediaType": "x", "digest": digest(b"x"), "size": 1 });
        for (target, words) in [
            (with(&good, "size", json!(1)), "has more than the 1 bytes"),
            (with(&good, "size", json!(100_000)), "has less than the 100000 bytes"),
            (with(&good, "size", json!(i64::MAX)), "more than the 4194304 that a document may have"),
            (with(&good, "mediaType", json!(INDEX)), "calls itself"),
            (with(&good, "mediaType", json!("text/html")), "neither an index nor a manifest"),
            (tower, "lead to too many others"),
            (index(&wide)?, "lead to too many others"),
            (index(&[with(&good, "size", json!(1))])?, "has more than the 1 bytes"),
            (index(&[with(&good, "digest", json!("sha256:../../../etc/passwd"))])?, "64 hexadecimal digits"),
            (api.put(MANIFEST, b"not json")?, "not a valid document"),
            (api.put(MANIFEST, "[".repeat(100_000).as_bytes())?, "not a valid document"),
            (api.put(MANIFEST, &vec![b' '; 5 << 20])?, "more than the 4194304"),
            (api.put_json(MANIFEST, &json!({ "layers": [] }))?, "without a config"),
            (
                api.put_json(MANIFEST, &json!({ "config": config, "layers": [], "manifests": [] }))?,
                "both an index and a manifest",
            ),
            (api.put_json(MANIFEST, &json!({ "config": config, "layers": [] }))?, "no wasm layer"),
        ] {
            api.name(IMAGE, &target)?;
            api.container(IMAGE, &["/"]).expect_error(&[words])?;
        }
        Ok(())
    })
}

fn layers(containerd: &Containerd) -> Outcome {
    leaving_nothing(containerd, |api| {
        let good = api.layer(WASM, "kit.wasm", &kit()?)?;
        let missing = digest(b"nobody has this");
        for (layer, words) in [
            (with(&good, "size", json!(7)), "has more than the 7 bytes"),
            (with(&good, "size", json!(100_000_000)), "has less than the 100000000 bytes"),
            (with(&good, "size", json!(1_u64 << 60)), "more than the max_module_size"),
            (with(&good, "digest", json!(missing)), "is not in containerd's content store"),
            (with(&good, "digest", json!("md5:0")), "sha256"),
            (api.layer(WASM, "kit.wasm", b"")?, "is empty"),
            (api.layer(WASM, "kit.wasm", b"\x1f\x8b\x08\0\0\0\0\0")?, "compressed"),
            (api.layer(WASM, "kit.wasm", &kit()?[..5000])?, "not a valid WebAssembly program"),
            (api.layer(WASM, "kit.wasm", PRECOMPILED)?, "precompiled"),
        ] {
            api.name(IMAGE, &api.manifest(vec![layer])?)?;
            api.container(IMAGE, &["/"]).expect_error(&[words])?;
        }
        let many: Vec<_> = (0..5000)
            .map(|number| {
                with(&good, "annotations", json!({ "org.opencontainers.image.title": format!("{number}.wasm\n") }))
            })
            .collect();
        api.name(IMAGE, &api.manifest(many)?)?;
        let error = api.container(IMAGE, &["/"]).expect_error(&["5000 modules", "0 (0.wasm), 1 (1.wasm)"])?;
        ensure!(error.len() < 2000, "{error}");
        api.container(IMAGE, &["/9.wasm", "exit", "3"]).expect_error(&["no module of it is called"])?;
        api.container(IMAGE, &["4999", "exit", "3"]).expect(3).map(drop)
    })
}

/// Somebody writes into containerd's own files.
fn damaged(containerd: &Containerd) -> Outcome {
    leaving_nothing(containerd, |api| {
        // Bytes of the case's own: the blob is shared by all who have it.
        let module = [&kit()?[..], b"\0\x05\x04this"].concat();
        let layer = api.layer(WASM, "app.wasm", &module)?;
        api.name(IMAGE, &api.manifest(vec![layer.clone()])?)?;
        let file = api.blob_file(&layer)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644))?;
        let mut other = module.clone();
        other[1000] ^= 1;
        for (content, words) in
            [(&other[..], "it is damaged"), (&module[..module.len() - 1], "has less than"), (b"", "has less than")]
        {
            fs::write(&file, content)?;
            api.container(IMAGE, &["/"]).expect_error(&[words])?;
        }
        fs::write(&file, &module)?;
        api.container(IMAGE, &["/", "exit", "3"]).expect(3)?;
        fs::remove_file(&file)?;
        api.container(IMAGE, &["/"]).expect_error(&[IMAGE])?;
        fs::write(&file, &module)?;
        Ok(())
    })
}

fn gone(containerd: &Containerd) -> Outcome {
    leaving_nothing(containerd, |api| {
        api.artifact(IMAGE, &[("kit.wasm", &kit()?)])?;
        api.container(IMAGE, &["/", "exit", "3"]).expect(3)?;
        api.forget(IMAGE)?;
        api.container(IMAGE, &["/"]).expect_error(&[IMAGE, "pull or import it again"])?;
        // A container without an image, as `ctr run --rootfs` makes them.
        api.container("", &["/app.wasm"]).expect_error(&["/app.wasm: the container has no root filesystem"])?;
        api.container("", &["/app.wasm"]).snapshot().expect_error(&["no such file in the image's root filesystem"])?;
        Ok(())
    })
}

fn too_large(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "small-images")?;
    api.artifact(IMAGE, &[("kit.wasm", &kit()?)])?;
    let small = api.container(IMAGE, &["/"]).options("max_module_size = \"2KiB\"\n");
    small.expect_error(&["kit.wasm: has", "more than the max_module_size of 2048"])?;
    api.client.expect_empty()
}

/// A bare shim whose containerd does this with whoever asks; counts them.
fn asked(shim: &Shim, act: impl Fn(UnixStream) + Send + 'static) -> Result<Arc<AtomicUsize>> {
    let count = Arc::new(AtomicUsize::new(0));
    let (listener, seen) = (UnixListener::bind(shim.folder().join("c.sock"))?, Arc::clone(&count));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            seen.fetch_add(1, Ordering::SeqCst);
            act(stream);
        }
    });
    Ok(count)
}

fn fresh(name: &str) -> Result<Shim> {
    Shim::new(&format!("img-{name}"))
}

/// A container without its module.
fn lacking(shim: &Shim, id: &str) -> Result<Task> {
    shim.task(&shim.bundle_of(id, &shim::spec(&["/none.wasm".to_owned()]))?)
}

fn expect_refusal(task: &Task, words: &[&str]) -> Outcome {
    for word in words {
        expect_code("create", task.create(), Code::UNKNOWN, word)?;
    }
    Ok(())
}

fn files_need_no_grpc() -> Outcome {
    let shim = fresh("files")?;
    let count = asked(&shim, drop)?;
    let task = shim.running("a", &guests::built("kit.wasm")?, &["exit", "3"])?;
    ensure!(task.wait()? == 3);
    task.delete()?;
    drop(task);
    ensure!(count.load(Ordering::SeqCst) == 0, "containerd was asked {count:?} times for nothing");
    // It would have been seen.
    ensure!(lacking(&shim, "b")?.create().is_err() && count.load(Ordering::SeqCst) > 0);
    shim.expect_end()
}

fn absent() -> Outcome {
    let shim = fresh("absent")?;
    let task = lacking(&shim, "a")?;
    let socket = shim.folder().join("c.sock").display().to_string();
    expect_refusal(
        &task,
        &[
            "/none.wasm: the container has no root filesystem",
            &format!("connect to containerd at {socket}: No such file"),
        ],
    )?;
    fs::write(task.folder.join("rootfs/other"), "")?;
    expect_refusal(&task, &["/none.wasm: no such file in the image's root filesystem"])?;
    drop(task);
    shim.expect_end()
}

/// The others do not wait with it.
fn hangs() -> Outcome {
    let shim = fresh("hangs")?;
    let held = std::sync::Mutex::new(Vec::new());
    asked(&shim, move |stream| held.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(stream))?;
    let slow = lacking(&shim, "slow")?;
    let waiting = thread::spawn(move || {
        let began = Instant::now();
        (expect_code("create", slow.create(), Code::UNKNOWN, "no answer within 10 s"), began.elapsed())
    });
    let began = Instant::now();
    let quick = shim.running("quick", &guests::built("kit.wasm")?, &["exit", "3"])?;
    ensure!(quick.wait()? == 3);
    quick.delete()?;
    drop(quick);
    ensure!(!waiting.is_finished(), "the other did not hang, or this took {:?}", began.elapsed());
    let Ok((refused, took)) = waiting.join() else { anyhow::bail!("the waiting thread panicked") };
    refused?;
    ensure!((Duration::from_secs(9)..SOON).contains(&took), "{took:?}");
    shim.expect_end()
}

fn hangs_up() -> Outcome {
    let shim = fresh("hangs-up")?;
    asked(&shim, |mut stream| drop(stream.read(&mut [0; 16])))?;
    expect_refusal(&lacking(&shim, "a")?, &["its layers cannot be looked at: ask containerd for the container"])?;
    shim.expect_end()
}

fn nonsense() -> Outcome {
    let shim = fresh("nonsense")?;
    asked(&shim, |mut stream| drop(stream.write_all(&b"220 mail.example.org ESMTP\r\n".repeat(1000))))?;
    expect_refusal(&lacking(&shim, "a")?, &["its layers cannot be looked at: ask containerd for the container"])?;
    shim.expect_end()
}

fn leaving() -> Outcome {
    let shim = fresh("leaving")?;
    let held = std::sync::Mutex::new(Vec::new());
    let count =
        asked(&shim, move |stream| held.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(stream))?;
    let task = lacking(&shim, "a")?;
    let waiting = thread::spawn(move || task.create());
    wait::until_true("containerd to be asked", SOON, || Ok(count.load(Ordering::SeqCst) > 0))?;
    let began = Instant::now();
    proc::signal(shim.daemon()?, rustix::process::Signal::TERM)?;
    wait::until_true("the shim to leave", SOON, || Ok(shim.daemons().is_empty()))?;
    ensure!(began.elapsed() < Duration::from_secs(6), "it waited {:?}", began.elapsed());
    let created: Option<ttrpc::Result<_>> = waiting.join().ok();
    ensure!(created.is_some_and(|created| created.is_err()), "a container was made by a process that left");
    shim.expect_end()
}
