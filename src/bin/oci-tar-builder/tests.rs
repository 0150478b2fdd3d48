//! What users rely on: the same input gives the same image, and a mistake on the command line is named.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;

use clap::Parser;
use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest};
use tempfile::TempDir;

use super::{Args, build};

/// A folder with `one.wasm`, `two.wasm` and `data.txt`.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["one.wasm", "two.wasm", "data.txt"] {
        fs::write(folder.path().join(name), name).unwrap();
    }
    folder
}

/// Builds `out` in the folder with the given options; `@name` stands for a file of the folder.
fn run(folder: &TempDir, out: &str, options: &[&str]) -> anyhow::Result<String> {
    let here = folder.path().to_str().unwrap();
    let out = format!("{here}/{out}");
    let mut line = vec!["oci-tar-builder".to_owned(), "--name=app".into(), "--repo=example.org/me".into(), "-o".into()];
    line.push(out);
    line.extend(options.iter().map(|option| option.replace('@', &format!("{here}/"))));
    build(&Args::try_parse_from(line)?)
}

fn members(tar: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(fs::File::open(tar).unwrap());
    let mut members = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        assert_eq!((entry.header().mtime().unwrap(), entry.header().uid().unwrap()), (0, 0));
        members.insert(entry.path().unwrap().display().to_string(), content);
    }
    members
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let folder = folder();
    let options = ["--rootfs", "--module=@one.wasm", "--module=@two.wasm", "--file=@data.txt:/etc/app/data.txt"];
    let first = run(&folder, "a.tar", &options).unwrap();
    let swapped = [options[0], options[2], options[1], options[3]];
    let second = run(&folder, "b.tar", &swapped).unwrap();
    assert_eq!(first, second);
    let read = |name| fs::read(folder.path().join(name)).unwrap();
    assert_eq!(read("a.tar"), read("b.tar"));
}

#[test]
fn the_layout_names_the_image_and_holds_every_blob() {
    let folder = folder();
    let options = ["--rootfs", "-m=@one.wasm", "--tag=v1", "--env=A=b=c", "--workdir=/srv", "--file=@data.txt:srv/d"];
    let digest = run(&folder, "a.tar", &options).unwrap();
    let members = members(&folder.path().join("a.tar"));
    let blob = |digest: &str| members[&format!("blobs/{}", digest.replace(':', "/"))].clone();

    let index: ImageIndex = serde_json::from_slice(&members["index.json"]).unwrap();
    let entry = &index.manifests()[0];
    let names = entry.annotations().as_ref().unwrap();
    assert_eq!(names["io.containerd.image.name"], "example.org/me/app:v1");
    assert_eq!(names["org.opencontainers.image.ref.name"], "v1");
    assert_eq!(entry.digest().to_string(), digest);

    let manifest: ImageManifest = serde_json::from_slice(&blob(&digest)).unwrap();
    let config: ImageConfiguration = serde_json::from_slice(&blob(manifest.config().digest().as_ref())).unwrap();
    let process = config.config().as_ref().unwrap();
    assert_eq!(process.entrypoint().as_deref(), Some(&["/one.wasm".to_owned()][..]));
    assert_eq!(process.env().as_deref(), Some(&["A=b=c".to_owned()][..]));
    assert_eq!(process.working_dir().as_deref(), Some("/srv"));

    let layer = manifest.layers()[0].digest().to_string();
    assert_eq!(config.rootfs().diff_ids(), std::slice::from_ref(&layer));
    fs::write(folder.path().join("layer.tar"), blob(&layer)).unwrap();
    let files = self::members(&folder.path().join("layer.tar"));
    assert_eq!(files.keys().map(String::as_str).collect::<Vec<_>>(), ["one.wasm", "srv", "srv/d"]);
}

#[test]
fn several_modules_have_no_default_entrypoint() {
    let folder = folder();
    run(&folder, "a.tar", &["--rootfs", "--module=@one.wasm", "--module=@two.wasm"]).unwrap();
    let config = members(&folder.path().join("a.tar"))
        .into_values()
        .find_map(|blob| serde_json::from_slice::<ImageConfiguration>(&blob).ok())
        .unwrap();
    assert_eq!(config.config().as_ref().unwrap().entrypoint().as_deref().unwrap_or_default(), &[] as &[String]);
}

#[test]
fn mistakes_are_named() {
    let folder = folder();
    let message = |options: &[&str]| format!("{:#}", run(&folder, "a.tar", options).unwrap_err());
    let module = "--module=@one.wasm";
    for (options, expected) in [
        (vec![module], "not supported yet: use --rootfs"),
        (vec![module, "--as-artifact"], "not supported yet: use --rootfs"),
        (vec![module, "--rootfs", "--layer=application/wasm=@one.wasm"], "not supported yet: use --rootfs"),
        (vec![module, "--rootfs", "--as-artifact"], "cannot be used with"),
        (vec!["--rootfs"], "--module <FILE>"),
        (vec!["--rootfs", "--module=@none.wasm"], "none.wasm: No such file"),
        (vec![module, "--rootfs", "--file=@data.txt"], "expected SRC:DST"),
        (vec![module, "--rootfs", "--file=@data.txt:../x"], "`..` is not allowed"),
        (vec![module, "--rootfs", "--file=@data.txt:/one.wasm"], "two files claim /one.wasm"),
        (vec![module, "--rootfs", "--file=@data.txt:/one.wasm/x"], "both a file and a directory"),
        (vec![module, "--rootfs", "--env=NAME"], "expected KEY=VALUE"),
        (vec![module, "--rootfs", "--workdir=data"], "expected an absolute path"),
    ] {
        let message = message(&options);
        assert!(message.contains(expected), "{options:?} gave: {message}");
    }
    assert!(!folder.path().join("a.tar").exists());
}
