//! What users rely on: the same input gives the same image, each kind is what its readers expect, and a mistake on the
//! command line is named.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;

use clap::{CommandFactory, Parser};
use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Args, build, wasm};

const MODULE: &str = "(module (func (export \"_start\")))";
const COMPONENT: &str = r#"(component
    (import "wasi:io/poll@0.2.6" (instance))
    (component $inner (import "hidden:one/x" (instance)))
    (instance $i (export "a" (instance 0)))
    (export "wasi:http/incoming-handler@0.2.6" (instance $i)))"#;

/// A folder with `one.wasm` and `two.wasm` (modules), `app.wasm` (a component), `data.txt`, and files that are no wasm.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let component = wat::parse_str(COMPONENT).unwrap();
    for (name, content) in [
        ("one.wasm", wat::parse_str(MODULE).unwrap()),
        ("two.wasm", wat::parse_str(format!("{MODULE} ;; 2").replace("_start", "two")).unwrap()),
        ("short.wasm", component[..component.len() - 3].to_owned()),
        ("app.wasm", component),
        ("data.txt", b"data".to_vec()),
        ("text.wat", MODULE.into()),
        ("code.cwasm", b"\x7fELF\x02\x01\x01\xc8\0\0\0\0\0\0\0\0".to_vec()),
        ("native.wasm", b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec()),
        ("empty.wasm", Vec::new()),
    ] {
        fs::write(folder.path().join(name), content).unwrap();
    }
    fs::create_dir(folder.path().join("sub")).unwrap();
    fs::copy(folder.path().join("one.wasm"), folder.path().join("sub/one.wasm")).unwrap();
    fs::copy(folder.path().join("one.wasm"), folder.path().join("sub/copy.wasm")).unwrap();
    folder
}

/// Builds `out` in the folder with the given options; `@name` stands for a file of the folder.
fn run(folder: &TempDir, out: &str, options: &[&str]) -> anyhow::Result<String> {
    let here = folder.path().to_str().unwrap();
    let mut line = vec!["oci-tar-builder".to_owned(), "--name=app".into(), "--repo=example.org/me".into()];
    line.extend(["-o".to_owned(), format!("{here}/{out}")]);
    line.extend(options.iter().map(|option| option.replace('@', &format!("{here}/"))));
    build(&Args::try_parse_from(line)?)
}

fn members(tar: impl Read) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(tar);
    let mut members = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        assert_eq!((entry.header().mtime().unwrap(), entry.header().uid().unwrap()), (0, 0));
        let twice = members.insert(entry.path().unwrap().display().to_string(), content);
        assert!(twice.is_none(), "{:?} is there twice", entry.path());
    }
    members
}

/// An image, read back.
struct Built {
    digest: String,
    index: ImageIndex,
    manifest: ImageManifest,
    blobs: BTreeMap<String, Vec<u8>>,
}

impl Built {
    fn with(options: &[&str]) -> Self {
        let folder = folder();
        let digest = run(&folder, "a.tar", options).unwrap();
        let blobs = members(fs::File::open(folder.path().join("a.tar")).unwrap());
        let index: ImageIndex = serde_json::from_slice(&blobs["index.json"]).unwrap();
        let manifest = serde_json::from_slice(&blobs[&path_of(&digest)]).unwrap();
        Self { digest, index, manifest, blobs }
    }

    fn blob(&self, digest: impl AsRef<str>) -> &[u8] {
        &self.blobs[&path_of(digest.as_ref())]
    }

    fn config(&self) -> ImageConfiguration {
        serde_json::from_slice(self.blob(self.manifest.config().digest())).unwrap()
    }

    fn entrypoint(&self) -> Vec<String> {
        self.config().config().as_ref().unwrap().entrypoint().clone().unwrap_or_default()
    }

    fn platform(&self) -> String {
        let platform = self.index.manifests()[0].platform().as_ref().unwrap();
        format!("{}/{}", platform.os(), platform.architecture())
    }

    /// Type and title of each layer.
    fn layers(&self) -> Vec<(String, String)> {
        let title = |annotations: &Option<std::collections::HashMap<String, String>>| {
            annotations.as_ref().map(|all| all["org.opencontainers.image.title"].clone()).unwrap_or_default()
        };
        let layers = self.manifest.layers().iter();
        layers.map(|layer| (layer.media_type().to_string(), title(layer.annotations()))).collect()
    }
}

fn path_of(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let folder = folder();
    let layers = ["-m=@one.wasm", "-l=application/x=@data.txt"];
    for (first, second) in [
        (&["--rootfs", "-m=@one.wasm", "-m=@two.wasm"][..], &["--rootfs", "-m=@two.wasm", "-m=@one.wasm"][..]),
        (&layers, &layers),
        (&["--as-artifact", "-m=@app.wasm"], &["--as-artifact", "-m=@app.wasm"]),
        (&["--components=@sub"], &["-m=@sub/copy.wasm", "-m=@sub/one.wasm"]),
    ] {
        assert_eq!(run(&folder, "a.tar", first).unwrap(), run(&folder, "b.tar", second).unwrap(), "{first:?}");
        let read = |name| fs::read(folder.path().join(name)).unwrap();
        assert_eq!(read("a.tar"), read("b.tar"), "{first:?}");
    }
}

#[test]
fn a_scratch_image_holds_files() {
    let options = ["--rootfs", "-m=@one.wasm", "--tag=v1", "--env=A=b=c", "--workdir=/srv", "--file=@data.txt:srv/d"];
    let built = Built::with(&options);
    let entry = &built.index.manifests()[0];
    let names = entry.annotations().as_ref().unwrap();
    assert_eq!(names["io.containerd.image.name"], "example.org/me/app:v1");
    assert_eq!(names["org.opencontainers.image.ref.name"], "v1");
    assert_eq!(entry.digest().to_string(), built.digest);

    let config = built.config();
    let process = config.config().as_ref().unwrap();
    assert_eq!(process.env().as_deref(), Some(&["A=b=c".to_owned()][..]));
    assert_eq!(process.working_dir().as_deref(), Some("/srv"));
    assert_eq!(built.entrypoint(), ["/one.wasm"]);
    assert!(built.platform().starts_with("linux/"));

    let layer = built.manifest.layers()[0].digest().to_string();
    assert_eq!(config.rootfs().diff_ids(), std::slice::from_ref(&layer));
    let files = members(built.blob(&layer));
    assert_eq!(files.keys().map(String::as_str).collect::<Vec<_>>(), ["one.wasm", "srv", "srv/d"]);
}

#[test]
fn an_image_of_wasm_layers_is_what_the_older_builder_makes() {
    let custom = "-l=application/vnd.wasm.content.layer.v1+wasm=@two.wasm";
    let built = Built::with(&["-m=@app.wasm", custom, "--env=A=b", "-l=application/x.config=@data.txt"]);
    let named = |kind: &str, name: &str| (kind.to_owned(), name.to_owned());
    assert_eq!(
        built.layers(),
        [
            named("application/vnd.bytecodealliance.wasm.component.layer.v0+wasm", "app.wasm"),
            named("application/vnd.wasm.content.layer.v1+wasm", "two.wasm"),
            named("application/x.config", "data.txt"),
        ]
    );
    let config = built.config();
    assert_eq!(built.manifest.config().media_type().to_string(), "application/vnd.oci.image.config.v1+json");
    assert_eq!((config.os().to_string(), config.architecture().to_string()), ("wasip1".into(), "wasm".into()));
    assert_eq!(built.platform(), "wasip1/wasm");
    assert_eq!(built.entrypoint(), ["app.wasm"], "two modules, one of them called as the image");
    assert_eq!(config.config().as_ref().unwrap().env().as_deref(), Some(&["A=b".to_owned()][..]));
    assert!(config.rootfs().diff_ids().is_empty());
    // The digests of the layers, joined and hashed again: `sha256sum` over their text gives the same.
    let digests: String = built.manifest.layers().iter().map(|layer| layer.digest().digest().to_owned()).collect();
    let labels = config.labels_of_config().cloned().unwrap_or_default();
    assert_eq!(labels["containerd.runwasi.layers"], super::layout::sha256(digests.as_bytes()));
}

#[test]
fn a_tar_layer_of_an_image_counts_for_its_root_filesystem() {
    let tar = "-l=application/vnd.oci.image.layer.v1.tar=@data.txt";
    let built = Built::with(&["-m=@one.wasm", tar]);
    let config = built.config();
    assert_eq!(config.rootfs().diff_ids(), &[built.manifest.layers()[1].digest().to_string()]);
    assert_eq!(config.history().as_ref().unwrap().len(), 1);
}

#[test]
fn an_artifact_tells_what_its_component_imports_and_exports() {
    let built = Built::with(&["--as-artifact", "--module=@app.wasm"]);
    assert_eq!(built.layers(), [("application/wasm".to_owned(), "app.wasm".to_owned())]);
    assert_eq!(built.manifest.config().media_type().to_string(), "application/vnd.wasm.config.v0+json");
    let config: Value = serde_json::from_slice(built.blob(built.manifest.config().digest())).unwrap();
    let expected = json!({
        "created": "1970-01-01T00:00:00Z",
        "architecture": "wasm",
        "os": "wasip2",
        "layerDigests": [built.manifest.layers()[0].digest().to_string()],
        "component": {
            "imports": ["wasi:io/poll@0.2.6"],
            "exports": ["wasi:http/incoming-handler@0.2.6"],
        },
    });
    assert_eq!(config, expected);
    assert_eq!(built.platform(), "wasip2/wasm");
}

#[test]
fn an_artifact_of_a_module_has_no_component() {
    let built = Built::with(&["--as-artifact", "-m=@one.wasm", "-m=@app.wasm"]);
    let config: Value = serde_json::from_slice(built.blob(built.manifest.config().digest())).unwrap();
    assert_eq!((&config["os"], config.get("component")), (&json!("wasip1"), None));
    assert_eq!(config["layerDigests"].as_array().unwrap().len(), 2);
    assert_eq!(built.layers()[0].1, "one.wasm", "the first is the entrypoint");
}

#[test]
fn the_entrypoint_is_the_only_module_or_the_one_called_as_the_image() {
    for (options, expected) in [
        (&["-m=@one.wasm"][..], &["one.wasm"][..]),
        (&["-m=@one.wasm", "-m=@app.wasm"], &["app.wasm"]),
        (&["-m=@one.wasm", "-m=@two.wasm"], &[]),
        (&["-l=application/wasm=@one.wasm"], &["one.wasm"]),
        (&["-m=@one.wasm", "--entrypoint=one.wasm#f", "--entrypoint=-x"], &["one.wasm#f", "-x"]),
        (&["--rootfs", "-m=@one.wasm"], &["/one.wasm"]),
        (&["--rootfs", "-m=@one.wasm", "-m=@app.wasm"], &["/app.wasm"]),
        (&["--rootfs", "-m=@one.wasm", "-m=@two.wasm"], &[]),
    ] {
        assert_eq!(Built::with(options).entrypoint(), expected, "{options:?}");
    }
}

#[test]
fn the_platform_can_be_chosen() {
    for (options, expected) in [
        (&["-m=@one.wasm", "--platform=wasi/wasm"][..], "wasi/wasm"),
        (&["-m=@one.wasm", "--rootfs", "--platform=wasip1/wasm"], "wasip1/wasm"),
        (&["-m=@one.wasm", "--rootfs", "--platform=linux/arm64"], "linux/arm64"),
    ] {
        let built = Built::with(options);
        let config = built.config();
        assert_eq!(built.platform(), expected);
        assert_eq!(format!("{}/{}", config.os(), config.architecture()), expected);
    }
}

#[test]
fn the_output_is_whole_or_untouched() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("a.tar"), "old").unwrap();
    run(&folder, "a.tar", &["-m=@data.txt"]).unwrap_err();
    assert_eq!(fs::read(path("a.tar")).unwrap(), b"old");
    // Through a link, into a folder that is not there, without anything beside it.
    symlink("a.tar", path("link.tar")).unwrap();
    run(&folder, "link.tar", &["-m=@one.wasm"]).unwrap();
    run(&folder, "new/deep/a.tar", &["-m=@one.wasm"]).unwrap();
    assert!(path("link.tar").is_symlink());
    assert_eq!(fs::read(path("a.tar")).unwrap(), fs::read(path("new/deep/a.tar")).unwrap());
    assert_eq!(fs::read_dir(path("new/deep")).unwrap().count(), 1);
    for (out, expected) in [("sub", "it is a folder"), ("data.txt/a.tar", "data.txt"), ("fifo", "a pipe")] {
        if out == "fifo" {
            rustix::fs::mkfifoat(rustix::fs::CWD, path("fifo"), rustix::fs::Mode::RUSR).unwrap();
        }
        let message = format!("{:#}", run(&folder, out, &["-m=@one.wasm"]).unwrap_err());
        assert!(message.starts_with("cannot write the image to ") && message.contains(expected), "{out}: {message}");
    }
}

#[test]
fn mistakes_are_named() {
    let folder = folder();
    let message = |options: &[&str]| format!("{:#}", run(&folder, "a.tar", options).unwrap_err());
    let module = "--module=@one.wasm";
    for (options, expected) in [
        (vec![], "--module <FILE>"),
        (vec!["--rootfs"], "--module <FILE>"),
        (vec![module, "--rootfs", "--as-artifact"], "cannot be used with"),
        (vec![module, "--rootfs", "--layer=application/wasm=@two.wasm"], "cannot be used with"),
        (vec![module, "--components=@sub"], "cannot be used with"),
        (vec![module, "--as-artifact", "--env=A=b"], "cannot be used with"),
        (vec![module, "--as-artifact", "--entrypoint=x"], "cannot be used with"),
        (vec![module, "--file=@data.txt:/x"], "--rootfs"),
        (vec!["--module=@none.wasm"], "none.wasm: No such file"),
        (vec!["--module=@data.txt"], "data.txt: is not a WebAssembly module or component"),
        (vec!["--module=@code.cwasm", "--rootfs"], "code.cwasm: is precompiled code"),
        (vec!["--module=@native.wasm"], "is a Linux program"),
        (vec!["--module=@text.wat", "--as-artifact"], "is WebAssembly text; convert it"),
        (vec!["--module=@empty.wasm"], "is empty"),
        (vec!["--module=@short.wasm"], "is damaged WebAssembly, build it again: "),
        (vec![module, "--module=@sub/one.wasm"], "two files are called one.wasm"),
        (vec![module, "--module=@sub/one.wasm", "--rootfs"], "two files claim /one.wasm"),
        (vec![module, "--layer=@two.wasm"], "expected TYPE=FILE"),
        (vec![module, "--layer=wasm=@two.wasm"], "`wasm` is no media type"),
        (vec![module, "--layer=application/wasm=@data.txt"], "data.txt: is not a WebAssembly"),
        (vec![module, "--layer=application/vnd.oci.image.layer.v1.tar+gzip=@data.txt"], "give the tar uncompressed"),
        (
            vec![module, "--layer=application/vnd.docker.image.rootfs.diff.tar.gzip=@data.txt"],
            "give the tar uncompressed",
        ),
        (vec!["--layer=application/x=@data.txt"], "there is no wasm"),
        (vec!["--layer=application/x=@data.txt", "--as-artifact"], "an artifact begins with wasm"),
        (
            vec![module, "--as-artifact", "--layer=application/vnd.oci.image.layer.v1.tar=@data.txt"],
            "no root filesystem",
        ),
        (vec!["--components=@none"], "none: No such file"),
        (vec![module, "--rootfs", "--file=@data.txt"], "expected SRC:DST"),
        (vec![module, "--rootfs", "--file=@data.txt:../x"], "`..` is not allowed"),
        (vec![module, "--rootfs", "--file=@data.txt:/one.wasm"], "two files claim /one.wasm"),
        (vec![module, "--rootfs", "--file=@data.txt:/one.wasm/x"], "both a file and a directory"),
        (vec![module, "--rootfs", "--env=NAME"], "expected KEY=VALUE"),
        (vec![module, "--workdir=data"], "expected an absolute path"),
        (vec![module, "--platform=windows/amd64"], "expected linux/ARCH"),
        (vec![module, "--platform=linux/pdp11"], "pdp11 is no architecture"),
        (vec![module, "--tag=a b"], "example.org/me/app:a b"),
        (vec![module, "--tag=a@sha256:1"], "is not the name of an image"),
    ] {
        let message = message(&options);
        assert!(message.contains(expected), "{options:?} gave: {message}");
    }
    assert!(!folder.path().join("a.tar").exists());
}

#[test]
fn the_command_line_is_consistent_and_no_bytes_are_too_strange() {
    Args::command().debug_assert();
    let good = wat::parse_str(COMPONENT).unwrap();
    for at in 0..good.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = value;
            let _ = wasm::Wasm::parse(&bytes);
        }
        // Cut between two sections it is a smaller component.
        let _ = wasm::Wasm::parse(&good[..at]);
    }
}
