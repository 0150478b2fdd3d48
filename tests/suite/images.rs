//! Every way wasm is packed, with every way to say what to run: files of a root filesystem, layers of wasm, and the
//! CNCF's artifact. `ctr run` takes the first everywhere, the second from containerd 1.7 on, and the third nowhere: it
//! refuses the artifact's config, so those containers are made through containerd's own API.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::common::api::Api;
use crate::common::containerd::Containerd;
use crate::common::ctr::Client;
use crate::common::http::{self, BOTH};
use crate::common::image::{self, Kind};
use crate::common::site::Site;
use crate::common::{Outcome, guests};

pub const CASES: crate::common::Cases = &[
    ("files_run_by_every_entrypoint", files),
    ("files_serve", files_serve),
    ("layers_run_by_every_entrypoint", layers),
    ("layers_serve", layers_serve),
    ("artifacts_run_by_every_entrypoint", artifacts),
    ("artifacts_serve", artifact_serves),
    ("artifacts_of_the_builder_run", built_artifact),
    ("the_older_layer_types_run", older_types),
];

/// The same program as a module and as a component.
pub const KITS: [&str; 2] = ["kit.wasm", "kit-component.wasm"];

/// What a guest was built to.
pub fn bytes(guest: &str) -> Result<Vec<u8>> {
    Ok(fs::read(guests::built(guest)?)?)
}

/// Packs an image and imports it; returns its name.
pub fn image_of(client: &Client<'_>, kind: Kind, name: &str, modules: &[&Path], options: &[&str]) -> Result<String> {
    let reference = format!("test.local/{name}:latest");
    let tar = image::pack_as(kind, name, modules, options)?;
    if kind == Kind::Rootfs {
        client.import(&reference, &tar)?;
    } else {
        // There is nothing to unpack, and containerd 1.6 fails at it.
        client.ctr(&["images", "import", "--all-platforms", "--no-unpack", &tar.display().to_string()])?;
    }
    Ok(reference)
}

/// A module's usual function, to be named; a component has one name for it only.
fn with_export(kit: &str, file: &str) -> Option<String> {
    (kit == "kit.wasm").then(|| format!("{file}#_start"))
}

pub fn forms(kit: &str) -> Vec<String> {
    let mut forms = vec![format!("/{kit}"), kit.to_owned(), format!("./{kit}"), format!("../{kit}")];
    forms.extend(with_export(kit, &format!("/{kit}")));
    forms
}

/// What names nothing: the only module is meant.
pub fn nothing(kit: &str) -> Vec<String> {
    let mut forms = vec!["/".to_owned(), String::new(), ".".to_owned()];
    forms.extend(with_export(kit, ""));
    forms
}

fn files(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("images");
    for kit in KITS {
        let module = guests::built(kit)?;
        let name = format!("one-{}", kit.trim_end_matches(".wasm"));
        let one = image_of(&client, Kind::Rootfs, &name, &[&module], &[])?;
        for form in forms(kit).into_iter().chain(nothing(kit)) {
            let done = client.image(&one, &[&form, "args"]).expect(0)?;
            ensure!(done.text() == format!("{form}\nargs\n"), "{form:?}: {done:?}");
        }
        // The image's own entrypoint.
        client.image(&one, &[]).to_end()?;
    }
    let modules = [guests::built(KITS[0])?, guests::built(KITS[1])?];
    let modules: Vec<_> = modules.iter().map(PathBuf::as_path).collect();
    let both = image_of(&client, Kind::Rootfs, "both-files", &modules, &[])?;
    client.image(&both, &["/", "args"]).expect_error("2 modules in /: kit-component.wasm, kit.wasm")?;
    client.image(&both, &["/none.wasm"]).expect_error("no such file in the image's root filesystem")?;
    client.expect_empty()
}

/// What `ctr` of this version can do with an image of wasm layers.
pub fn takes_layers(containerd: &Containerd) -> bool {
    containerd.version != "1.6"
}

fn layers(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("images");
    for kit in KITS {
        let module = guests::built(kit)?;
        let name = format!("layer-{}", kit.trim_end_matches(".wasm"));
        let image = image_of(&client, Kind::Layers, &name, &[&module], &[])?;
        if !takes_layers(containerd) {
            // containerd's own error, before any shim is asked; the README says what to do.
            client.image(&image, &[&format!("/{kit}"), "args"]).expect_error("mismatched image rootfs")?;
            continue;
        }
        let others = ["/other.wasm".to_owned(), "0".to_owned()];
        for form in forms(kit).into_iter().chain(nothing(kit)).chain(others) {
            let done = client.image(&image, &[&form, "args"]).expect(0)?;
            ensure!(done.text() == format!("{form}\nargs\n"), "{form:?}: {done:?}");
        }
        client.image(&image, &[&format!("/{kit}"), "exit", "1"]).expect(1)?;
    }
    client.expect_empty()
}

fn serves(site: &Site<'_>) -> Outcome {
    http::block_on(async {
        for protocol in BOTH {
            http::get(site.addr, protocol, "/").await?.expect(200, "hello world\n")?;
        }
        Ok(())
    })?;
    site.drain("SIGTERM", 0).map(drop)
}

fn files_serve(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("images");
    let image = image_of(&client, Kind::Rootfs, "file-http", &[&guests::built("hello-http.wasm")?], &[])?;
    for words in [&["/hello-http.wasm"][..], &["hello-http.wasm"], &["/"], &[]] {
        serves(&Site::start(client.image(&image, words))?)?;
    }
    client.expect_empty()
}

fn layers_serve(containerd: &Containerd) -> Outcome {
    if !takes_layers(containerd) {
        return Ok(());
    }
    let client = containerd.namespace("images");
    let image = image_of(&client, Kind::Layers, "layer-http", &[&guests::built("hello-http.wasm")?], &[])?;
    for words in [&["/hello-http.wasm"][..], &["hello-http.wasm"], &["/"], &[]] {
        serves(&Site::start(client.image(&image, words))?)?;
    }
    client.expect_empty()
}

fn artifacts(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "artifacts")?;
    for kit in KITS {
        let image = format!("test.local/artifact-{kit}:latest");
        for title in [kit, ""] {
            api.artifact(&image, &[(title, &bytes(kit)?)])?;
            for form in forms(kit).into_iter().chain(nothing(kit)) {
                let plan = api.container(&image, &[&form, "args"]);
                ensure!(plan.expect(0)? == format!("{form}\nargs\n"), "{form:?}");
            }
        }
        // As CRI does it: with an empty root filesystem.
        let output = api.container(&image, &["/", "read", "/none"]).snapshot().expect(1)?;
        ensure!(output.contains("/none"), "{output:?}");
        // No arguments at all, which the guest finds wrong, and no root in the specification.
        let bare = api.container(&image, &[]).spec(|spec| {
            spec["process"]["args"] = Value::Null;
            spec.as_object_mut().map(|spec| spec.remove("root"));
        });
        bare.expect(if kit == "kit.wasm" { 2 } else { 1 })?;
    }
    api.client.expect_empty()
}

fn artifact_serves(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "artifacts")?;
    let image = "test.local/artifact-http:latest";
    api.artifact(image, &[("hello-http.wasm", &bytes("hello-http.wasm")?)])?;
    for has_snapshot in [false, true] {
        let plan = api.container(image, &["/"]).spec(|spec| {
            spec["process"]["env"] = json!(["WASMTIME_HTTP_PROXY_SOCKET_ADDR=127.0.0.1:0"]);
        });
        let plan = if has_snapshot { plan.snapshot() } else { plan };
        let offset = containerd.log_length();
        let container = plan.start()?;
        let site = Site::of(containerd, container, plan.log()?, offset)?;
        serves(&site)?;
        site.container.delete()?;
        plan.forget()?;
    }
    api.client.expect_empty()
}

fn built_artifact(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "artifacts")?;
    let module = guests::built("kit.wasm")?;
    let image = image_of(&api.client, Kind::Artifact, "built-artifact", &[&module], &[])?;
    // The reason why all this goes through the API.
    api.client.image(&image, &["/kit.wasm"]).expect_error("")?;
    ensure!(api.container(&image, &["/kit.wasm", "args"]).expect(0)? == "/kit.wasm\nargs\n");
    api.container(&image, &["kit.wasm#_start", "exit", "3"]).snapshot().expect(3)?;
    api.client.expect_empty()
}

fn older_types(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "artifacts")?;
    for kind in
        ["application/vnd.bytecodealliance.wasm.component.layer.v0+wasm", "application/vnd.wasm.content.layer.v1+wasm"]
    {
        let layer = api.layer(kind, "kit.wasm", &bytes("kit.wasm")?)?;
        let text = api.layer("text/plain", "README", b"not a module")?;
        api.name("test.local/older:latest", &api.manifest(vec![text, layer])?)?;
        api.container("test.local/older:latest", &["/kit.wasm", "exit", "3"]).expect(3)?;
    }
    Ok(())
}
