//! The verb `compile` and images that containerd has: by their names, of every kind, and what it says about the others.

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use super::cache::{compiles, entries, fresh};
use super::images::{image_of, takes_layers};
use crate::common::api::{Api, INDEX, MANIFEST, WASM, digest};
use crate::common::containerd::Containerd;
use crate::common::image::Kind;
use crate::common::job::{self, Done};
use crate::common::{Outcome, guests};

pub const CASES: crate::common::Cases = &[
    ("an_image_of_files_is_compiled_by_its_name", files),
    ("an_image_of_layers_is_compiled_by_its_name", layers),
    ("compressed_layers_and_platforms_are_compiled", packed),
    ("what_is_no_image_is_named", no_image),
    ("what_is_wrong_with_an_image_is_named", wrong),
];

const COMPILED: Duration = Duration::from_secs(120);
const GZIPPED: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// The verb, into the folder that the containers use.
fn compile(containerd: &Containerd, words: &[&str]) -> Result<Done> {
    let mut command = Command::new(containerd.folder().join("bin/containerd-shim-wasmtime-v1"));
    command.arg("compile").arg("--cache-dir").arg(containerd.cache()).args(words);
    job::run(command, COMPILED)
}

/// The verb for an image of this containerd.
fn compile_image(containerd: &Containerd, namespace: &str, image: &str) -> Result<Done> {
    let socket = containerd.socket().display().to_string();
    compile(containerd, &["--address", &socket, "--namespace", namespace, image])
}

/// It made these entries, in this order, and no others.
fn made(done: Done, names: &[String]) -> Outcome {
    let lines = done.success("compile")?;
    let fields: Vec<Vec<&str>> = lines.lines().map(|line| line.split('\t').collect()).collect();
    let told: Vec<_> = fields.iter().map(|line| (line[1], line[5].to_owned())).collect();
    let expected: Vec<_> = names.iter().map(|name| ("compiled", name.clone())).collect();
    ensure!(told == expected, "{lines}");
    Ok(())
}

fn kits() -> Result<[PathBuf; 2]> {
    Ok([guests::built("kit-component.wasm")?, guests::built("kit.wasm")?])
}

fn no_further_compile(containerd: &Containerd, count: usize) -> Outcome {
    ensure!(compiles(containerd) == 0, "{} compiles", compiles(containerd));
    ensure!(entries(containerd)?.len() == count, "{:?}", entries(containerd)?);
    Ok(())
}

fn files(containerd: &Containerd) -> Outcome {
    fresh(containerd, "by-files", |containerd| {
        let client = containerd.namespace("by-name");
        let kits = kits()?;
        let image = image_of(&client, Kind::Rootfs, "ahead-files", &[&kits[0], &kits[1]], &[])?;
        let names = ["/kit-component.wasm", "/kit.wasm"].map(|file| format!("{image}:{file}"));
        made(compile_image(containerd, "by-name", &image)?, &names)?;
        client.image(&image, &["/kit.wasm", "exit", "3"]).expect(3)?;
        client.image(&image, &["/kit-component.wasm", "exit", "0"]).expect(0)?;
        no_further_compile(containerd, 2)?;
        let again = compile_image(containerd, "by-name", &image)?.success("compile")?;
        ensure!(again.lines().count() == 2 && again.matches("\tcached\t").count() == 2, "{again}");
        client.expect_empty()
    })
}

fn layers(containerd: &Containerd) -> Outcome {
    fresh(containerd, "by-layers", |containerd| {
        let client = containerd.namespace("by-name");
        let kits = kits()?;
        let image = image_of(&client, Kind::Layers, "ahead-layers", &[&kits[0], &kits[1]], &[])?;
        let names = ["kit-component.wasm", "kit.wasm"].map(|file| format!("{image}:{file}"));
        made(compile_image(containerd, "by-name", &image)?, &names)?;
        let api = Api::connect(containerd, "by-name")?;
        for (file, code) in [("/kit.wasm", 3), ("/kit-component.wasm", 0)] {
            api.container(&image, &[file, "exit", &code.to_string()]).expect(code)?;
        }
        if takes_layers(containerd) {
            // The same module in another image.
            let one = image_of(&client, Kind::Layers, "ahead-layer", &[&kits[1]], &[])?;
            client.image(&one, &["/kit.wasm", "exit", "3"]).expect(3)?;
        }
        no_further_compile(containerd, 2)?;
        client.expect_empty()
    })
}

/// A layer of one file.
fn layer_of(api: &Api<'_>, file: &str, wasm: &Path) -> Result<serde_json::Value> {
    let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    tar.append_path_with_name(wasm, file)?;
    let mut gzip = tar.into_inner()?;
    gzip.flush()?;
    api.put(GZIPPED, &gzip.finish()?)
}

fn packed(containerd: &Containerd) -> Outcome {
    fresh(containerd, "by-platform", |containerd| {
        let api = Api::connect(containerd, "by-name")?;
        let image = "docker.io/library/packed:latest";
        let [component, module] = kits()?;
        let host = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let on = |mut descriptor: serde_json::Value, os: &str, architecture: &str| {
            descriptor["platform"] = json!({ "os": os, "architecture": architecture });
            descriptor
        };
        let files = api.manifest(vec![
            layer_of(&api, "bin/old.wasm", &guests::built("exports.wasm")?)?,
            // In its place.
            layer_of(&api, "bin/old.wasm", &module)?,
        ])?;
        let artifact = api.manifest(vec![api.layer(WASM, "", &fs::read(&component)?)?])?;
        let foreign = api.manifest(vec![api.layer(WASM, "no.wasm", b"not for this node")?])?;
        let gone = json!({ "mediaType": MANIFEST, "digest": digest(b"never pulled"), "size": 12 });
        let children = [
            on(gone, "wasip2", "wasm"),
            on(foreign, "linux", "s390x"),
            on(files, "linux", host),
            on(artifact, "wasip1", "wasm"),
        ];
        api.name(image, &api.put_json(INDEX, &json!({ "schemaVersion": 2, "manifests": children }))?)?;
        // As people say it.
        let names = [format!("packed:{}", "/bin/old.wasm"), format!("packed:{}", digest(&fs::read(&component)?))];
        made(compile_image(containerd, "by-name", "packed")?, &names)?;
        api.container(image, &["/", "exit", "0"]).expect(0)?;
        no_further_compile(containerd, 2)
    })
}

/// It fails, with all of these words on one line, and exit code 1.
fn refused(done: &Done, words: &[&str]) -> Outcome {
    let is_clear = done.stderr.lines().count() == 1 && words.iter().all(|word| done.stderr.contains(word));
    ensure!(done.code == Some(1) && is_clear, "expected {words:?} in {done:?}");
    Ok(())
}

fn no_image(containerd: &Containerd) -> Outcome {
    let api = Api::connect(containerd, "by-name")?;
    api.artifact("test.local/here:1", &[("kit.wasm", &fs::read(guests::built("kit.wasm")?)?)])?;
    let socket = containerd.folder().join("nobody.sock").display().to_string();
    let unreachable = compile(containerd, &["--address", &socket, "test.local/here:1"])?;
    refused(&unreachable, &["test.local/here:1", &format!("connect to containerd at {socket}: "), "start containerd"])?;
    for (namespace, image, words) in [
        ("by-name", "nobody-has-this", &["\"by-name\"", "image pull docker.io/library/nobody-has-this:latest"][..]),
        ("by-name", "test.local/here:2", &["image pull test.local/here:2", "--namespace"]),
        ("elsewhere", "test.local/here:1", &["no such image in the namespace \"elsewhere\"", "k8s.io"]),
        ("by-name", "Upper:Case:Name", &["no such file", "invalid reference"]),
        ("by-name", "./none", &["./none: there is no such file", "as a path"]),
        ("by-name", "/none/at/all", &["/none/at/all: there is no such file", "as a path"]),
        ("by-name", "none.wasm", &["none.wasm: there is no such file"]),
    ] {
        refused(&compile_image(containerd, namespace, image)?, words)?;
    }
    Ok(())
}

fn wrong(containerd: &Containerd) -> Outcome {
    fresh(containerd, "by-lies", |containerd| {
        let api = Api::connect(containerd, "by-name")?;
        let image = "test.local/lies:latest";
        let kit = api.layer(WASM, "kit.wasm", &fs::read(guests::built("kit.wasm")?)?)?;
        let with = |key: &str, value: serde_json::Value| {
            let mut layer = kit.clone();
            layer[key] = value;
            api.manifest(vec![layer])
        };
        let lost = layer_of(&api, "app.wasm", &guests::built("exports.wasm")?)?;
        let broken = layer_of(&api, "b.wasm", &guests::built("exports.wasm")?)?;
        let file = api.blob_file(&broken)?;
        let mut bytes = fs::read(&file)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::set_permissions(&file, Permissions::from_mode(0o644))?;
        fs::write(&file, bytes)?;
        fs::remove_file(api.blob_file(&lost)?)?;
        for (target, words) in [
            (api.manifest(vec![api.layer("text/plain", "README", b"text")?])?, "holds no wasm module"),
            (with("size", json!(7))?, "more bytes than it is said to have"),
            (with("size", json!(100_000_000))?, "ends after"),
            (with("size", json!(1_u64 << 60))?, "max_module_size"),
            (with("digest", json!(digest(b"nobody has this")))?, "is not in containerd's content store"),
            (with("digest", json!("md5:0"))?, "sha256"),
            (api.manifest(vec![lost])?, IMAGE_IS_INCOMPLETE),
            (api.manifest(vec![broken])?, GZIPPED),
            (api.put(MANIFEST, b"not json")?, "not a valid document"),
            (api.put("text/html", b"hello")?, "neither an index nor a manifest"),
        ] {
            api.name(image, &target)?;
            refused(&compile_image(containerd, "by-name", image)?, &[image, words])?;
        }
        // What is right is compiled all the same.
        let text = api.layer(WASM, "text.wasm", b"no module")?;
        api.name(image, &api.manifest(vec![text, kit.clone()])?)?;
        let done = compile_image(containerd, "by-name", image)?;
        refused(&done, &["text.wasm"])?;
        ensure!(done.text().ends_with(&format!("\t{image}:kit.wasm\n")), "{done:?}");
        ensure!(entries(containerd)?.len() == 1, "{:?}", entries(containerd)?);
        Ok(())
    })
}

/// containerd's own error where its records say that the blob is there, else ours.
const IMAGE_IS_INCOMPLETE: &str = "containerd";
