//! Images that lie. Each has its own clear error, and nothing is left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::images_choice::PRECOMPILED;
use crate::common::api::{Api, INDEX, MANIFEST, WASM, digest};
use crate::common::containerd::Containerd;
use crate::common::{Outcome, SOON, guests, proc, wait};

pub const CASES: crate::common::Cases = &[
    ("documents_that_lie_are_refused", documents),
    ("layers_that_lie_are_refused", layers),
    ("what_is_damaged_on_disk_is_refused", damaged),
    ("code_of_others_needs_their_layer", stolen),
    ("what_is_gone_is_named", gone),
    ("a_module_above_the_limit_is_not_read", too_large),
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
        // Nobody needs it any more: its code was compiled from what its digest says.
        for content in [&other[..], b""] {
            fs::write(&file, content)?;
            api.container(IMAGE, &["/", "exit", "3"]).expect(3)?;
        }
        fs::write(&file, &module)?;
        Ok(())
    })
}

/// A digest is no secret: an image that lists somebody else's must not run their module.
fn stolen(containerd: &Containerd) -> Outcome {
    let (owner, thief) = (Api::connect(containerd, "owner")?, Api::connect(containerd, "thief")?);
    let layer = owner.layer(WASM, "app.wasm", &[&kit()?[..], b"\0\x05\x04mine"].concat())?;
    owner.name(IMAGE, &owner.manifest(vec![layer.clone()])?)?;
    owner.container(IMAGE, &["/", "exit", "3"]).expect(3)?;
    thief.name(IMAGE, &thief.manifest(vec![layer])?)?;
    thief.container(IMAGE, &["/"]).expect_error(&["is not in containerd's content store"])?;
    owner.client.expect_empty()?;
    thief.client.expect_empty()
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
