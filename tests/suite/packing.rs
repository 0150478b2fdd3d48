//! What `oci-tar-builder` writes, read by those who get it: three containerds, skopeo, umoci.
//!
//! Where one of them cannot take a kind of image, the case says what it answers instead: the README tells users the same.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::common::containerd::Containerd;
use crate::common::image::{self, Kind};
use crate::common::{BareCases, Cases, Outcome, SOON, base, guests, job};

pub const CASES: Cases = &[
    ("every_kind_is_imported_where_it_can_be", imported),
    ("scratch_images_run_whatever_their_platform", run),
    ("a_platform_of_wasm_asks_for_all_platforms", platforms),
];

pub const BARE: BareCases = &[
    ("the_command_of_the_older_builder_makes_its_folder", older_command),
    ("the_digest_is_the_same_everywhere", stable),
    ("skopeo_reads_every_kind", skopeo),
    ("umoci_reads_what_it_can", umoci),
];

/// Says an older containerd of layers that are no tars.
const NOT_UNPACKED: &str = "mismatched image rootfs and manifest layers";
/// Says every `ctr` that was not told `--all-platforms`.
const FILTERED: &str = "image might be filtered out";

/// An image of one kind with a component in it.
fn packed(kind: Kind) -> Result<(String, PathBuf)> {
    let name = format!("packing-{kind:?}").to_lowercase();
    let options: &[&str] = if kind == Kind::Artifact { &[] } else { &["--env=A=b"] };
    let tar = image::pack_as(kind, &name, &[&guests::built("hello-http.wasm")?], options)?;
    Ok((format!("test.local/{name}:latest"), tar))
}

/// Index, manifest and config of a layout, and where its blobs are.
struct Layout {
    folder: PathBuf,
    digest: String,
    manifest: Value,
}

impl Layout {
    /// Unpacks a tar into a folder of this name.
    fn unpack(name: &str, tar: &Path) -> Result<Self> {
        let folder = base::folder(&format!("layouts/{name}"))?;
        tar::Archive::new(fs::File::open(tar)?).unpack(&folder)?;
        let index: Value = serde_json::from_slice(&fs::read(folder.join("index.json"))?)?;
        let digest = index["manifests"][0]["digest"].as_str().context("no manifest")?.to_owned();
        let mut layout = Self { folder, digest, manifest: Value::Null };
        layout.manifest = serde_json::from_slice(&fs::read(layout.blob(&layout.digest))?)?;
        Ok(layout)
    }

    fn blob(&self, digest: &str) -> PathBuf {
        self.folder.join("blobs").join(digest.replace(':', "/"))
    }

    fn layer(&self) -> &str {
        self.manifest["layers"][0]["digest"].as_str().unwrap_or_default()
    }
}

fn imported(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("packing");
    for kind in Kind::ALL {
        let (reference, tar) = packed(kind)?;
        let layout = Layout::unpack(&format!("{kind:?}-{}", containerd.version), &tar)?;
        let tar = tar.display().to_string();
        let done = job::run(client.command(&["images", "import", "--all-platforms", &tar]), SOON)?;
        if containerd.version == "1.6" && kind != Kind::Rootfs {
            ensure!(done.code != Some(0) && done.stderr.contains(NOT_UNPACKED), "{kind:?}: {done:?}");
            continue;
        }
        done.success(&format!("the import of {kind:?}"))?;
        let listed = client.ctr(&["images", "ls", &format!("name=={reference}")])?;
        ensure!(listed.contains(&layout.digest), "{kind:?}: {listed} is not {}", layout.digest);
        // What a shim finds in the content store is the file that was packed.
        let mut get = client.command(&["content", "get", layout.layer()]);
        get.stdin(std::process::Stdio::null());
        let stored = job::run(get, SOON)?;
        ensure!(stored.stdout == fs::read(layout.blob(layout.layer()))?, "{kind:?}: {}", stored.stderr);
    }
    Ok(())
}

fn run(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("packing");
    let kit = guests::built("kit.wasm")?;
    for platform in ["linux", "wasip1/wasm", "wasi/wasm"] {
        let name = format!("platform-{}", platform.replace('/', "-"));
        let chosen = format!("--platform={platform}");
        let mut options = vec!["--env=GREETING=hello", "--entrypoint=/kit.wasm", "--entrypoint=env"];
        if platform != "linux" {
            options.push(&chosen);
        }
        let tar = image::pack(&name, &[&kit], &options)?;
        let reference = format!("test.local/{name}:latest");
        client.import(&reference, &tar)?;
        let text = client.image(&reference, &[]).expect(0)?.text();
        ensure!(text.lines().any(|line| line == "GREETING=hello"), "{platform}: {text}");
    }
    Ok(())
}

fn platforms(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("packing-platforms");
    for kind in Kind::ALL {
        let (_, tar) = packed(kind)?;
        let done = job::run(client.command(&["images", "import", &tar.display().to_string()]), SOON)?;
        let refused = done.code != Some(0) && done.stderr.contains(FILTERED);
        ensure!(refused == (kind != Kind::Rootfs), "{kind:?}: {done:?}");
    }
    Ok(())
}

/// Word for word what people type, in a folder that has nothing but the module.
const OLDER: &str = "--name wasi-http --repo ghcr.io/containerd/runwasi --tag latest --module wasi-http.wasm \
                     -o ./dist/wasi-http-img-oci.tar";

fn older_command() -> Outcome {
    let folder = base::folder("older")?;
    fs::copy(guests::built("hello-http.wasm")?, folder.join("wasi-http.wasm"))?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_oci-tar-builder"));
    command.args(OLDER.split_whitespace()).current_dir(&folder);
    let digest = job::run(command, SOON)?.success("oci-tar-builder")?;
    let layout = Layout::unpack("older", &folder.join("dist/wasi-http-img-oci.tar"))?;
    ensure!(digest.trim() == layout.digest, "{digest} is not {}", layout.digest);
    ensure!(fs::read(layout.blob(layout.layer()))? == fs::read(folder.join("wasi-http.wasm"))?);
    Ok(())
}

fn stable() -> Outcome {
    let component = guests::built("hello-http.wasm")?;
    for kind in Kind::ALL {
        let mut images = Vec::new();
        for place in ["here", "there"] {
            // Another folder, another time of the file, other rights for others: none of that is the image's.
            let folder = base::folder(&format!("stable/{kind:?}/{place}"))?;
            let module = folder.join("app.wasm");
            fs::write(&module, fs::read(&component)?)?;
            let seconds = if place == "here" { 1 } else { 2_000_000_000 };
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            fs::File::open(&module)?.set_modified(time)?;
            let mut command = image::builder(kind, "app", &[Path::new("app.wasm")], &["-o", "app.tar"]);
            command.current_dir(&folder).env("TZ", if place == "here" { "UTC" } else { "Asia/Tokyo" });
            let digest = job::run(command, SOON)?.success("oci-tar-builder")?;
            images.push((digest, fs::read(folder.join("app.tar"))?));
        }
        ensure!(images[0] == images[1], "{kind:?}: {} and {}", images[0].0, images[1].0);
    }
    Ok(())
}

fn skopeo() -> Outcome {
    for kind in Kind::ALL {
        let (_, tar) = packed(kind)?;
        let layout = Layout::unpack(&format!("skopeo-{kind:?}"), &tar)?;
        let archive = format!("oci-archive:{}:latest", tar.display());
        let skopeo = |words: &[&str]| {
            let mut command = Command::new("skopeo");
            command.args(words);
            job::run(command, SOON)
        };
        let raw = skopeo(&["inspect", "--raw", &archive])?.success("skopeo inspect --raw")?;
        ensure!(serde_json::from_str::<Value>(&raw)? == layout.manifest, "{kind:?}: {raw}");
        let inspected = skopeo(&["inspect", &archive])?;
        if kind == Kind::Artifact {
            // What an artifact's config says is not for skopeo to tell.
            ensure!(inspected.stderr.contains("unsupported image-specific operation on artifact"), "{inspected:?}");
        } else {
            let inspected: Value = serde_json::from_str(&inspected.success("skopeo inspect")?)?;
            ensure!(inspected["Digest"] == layout.digest.as_str(), "{kind:?}: {inspected}");
            ensure!(inspected["Env"][0] == "A=b", "{kind:?}: {inspected}");
            ensure!(inspected["Layers"][0] == layout.layer(), "{kind:?}: {inspected}");
        }
        // A copy reads and checks every blob.
        let copy = format!("dir:{}", base::folder(&format!("layouts/copy-{kind:?}"))?.display());
        skopeo(&["copy", "--insecure-policy", &archive, &copy])?.success("skopeo copy")?;
    }
    Ok(())
}

fn umoci() -> Outcome {
    for kind in Kind::ALL {
        let (_, tar) = packed(kind)?;
        let layout = Layout::unpack(&format!("umoci-{kind:?}"), &tar)?;
        let umoci = |words: &[&str]| {
            let mut command = Command::new("umoci");
            command.args(words);
            job::run(command, SOON)
        };
        let folder = layout.folder.display().to_string();
        let tags = umoci(&["ls", "--layout", &folder])?.success("umoci ls")?;
        ensure!(tags.trim() == "latest", "{kind:?}: {tags}");
        let stat = umoci(&["stat", "--json", "--image", &format!("{folder}:latest")])?;
        match kind {
            Kind::Artifact => ensure!(stat.stderr.contains("unknown config blob type"), "{stat:?}"),
            Kind::Layers => drop(stat.success("umoci stat")?),
            Kind::Rootfs => {
                ensure!(stat.success("umoci stat")?.contains(layout.layer()));
                let bundle = base::folder("layouts")?.join("bundle");
                umoci(&["unpack", "--image", &format!("{folder}:latest"), &bundle.display().to_string()])?
                    .success("umoci unpack")?;
                let unpacked = fs::read(bundle.join("rootfs/hello-http.wasm"))?;
                ensure!(unpacked == fs::read(guests::built("hello-http.wasm")?)?);
            }
        }
    }
    Ok(())
}
