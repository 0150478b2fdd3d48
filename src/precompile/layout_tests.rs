//! Layouts made by hand, and damaged ones.

use std::io::Write as _;

use proptest::prelude::*;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use super::super::layers::hex;
use super::*;

const MOST: u64 = 1 << 20;

fn wasm(text: &str) -> Vec<u8> {
    [b"\0asm\x01\0\0\0", text.as_bytes()].concat()
}

fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for (name, content) in members {
        let mut header = Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_entry_type(if name.ends_with('/') { EntryType::Directory } else { EntryType::Regular });
        tar.append_data(&mut header, name, *content).unwrap();
    }
    tar.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A layout in the making: blobs by digest.
#[derive(Default)]
struct Blobs(Vec<(String, Vec<u8>)>);

impl Blobs {
    fn add(&mut self, media: &str, bytes: Vec<u8>) -> Value {
        let digest = hex(&Sha256::digest(&bytes));
        let size = bytes.len();
        self.0.push((format!("blobs/sha256/{digest}"), bytes));
        json!({ "mediaType": media, "digest": format!("sha256:{digest}"), "size": size })
    }

    fn image(&mut self, layers: Vec<(&str, Vec<u8>)>) -> Value {
        let config = self.add("application/vnd.oci.image.config.v1+json", b"{}".to_vec());
        let layers: Vec<_> = layers.into_iter().map(|(media, bytes)| self.add(media, bytes)).collect();
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers });
        self.add("application/vnd.oci.image.manifest.v1+json", manifest.to_string().into_bytes())
    }

    fn pack(&self, manifests: &[Value]) -> Vec<u8> {
        let index = json!({ "schemaVersion": 2, "manifests": manifests }).to_string();
        let mut members = vec![("index.json", index.as_bytes())];
        members.extend(self.0.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())));
        tar(&members)
    }
}

fn found(layout: &[u8]) -> Result<Vec<Found>> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(layout).unwrap();
    file.rewind().unwrap();
    Layout::tar(file)?.modules(MOST)
}

fn names(layout: &[u8]) -> Vec<String> {
    found(layout).unwrap().into_iter().map(|found| found.name).collect()
}

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

#[test]
fn files_and_wasm_layers_are_found_in_all_images() {
    let mut blobs = Blobs::default();
    let files = tar(&[("./bin/app", &wasm("a")), ("readme.txt", b"text"), ("b.wasm", &wasm("b"))]);
    let plain = blobs.image(vec![(LAYER, files.clone())]);
    let packed = blobs.image(vec![("application/vnd.docker.image.rootfs.diff.tar.gzip", gzip(&files))]);
    let zstd = compress_to_vec(&tar(&[("z.wasm", &wasm("z"))])[..], CompressionLevel::Fastest);
    let zstd = blobs.image(vec![("application/vnd.oci.image.layer.v1.tar+zstd", zstd)]);
    let artifact = blobs.image(vec![("application/wasm", wasm("c")), ("application/json", b"{}".to_vec())]);
    let digest = hex(&Sha256::digest(wasm("c")));
    let list = json!({ "schemaVersion": 2, "manifests": [packed, zstd, artifact] }).to_string().into_bytes();
    let nested = blobs.add("application/vnd.oci.image.index.v1+json", list);
    let layout = blobs.pack(&[plain, nested]);
    let files = ["/b.wasm", "/bin/app", "/z.wasm"].map(str::to_owned);
    assert_eq!(names(&layout), [&files[..], &[format!("sha256:{digest}")]].concat());
}

/// An archive as `docker save` wrote it until version 24: no index, layers by the names of their folders.
fn archive(layers: &[(&str, &[u8])], diff_ids: &[&[u8]]) -> Vec<u8> {
    let ids: Vec<_> = diff_ids.iter().map(|layer| format!("sha256:{}", hex(&Sha256::digest(layer)))).collect();
    let config = json!({ "architecture": "amd64", "rootfs": { "type": "layers", "diff_ids": ids } }).to_string();
    let names: Vec<_> = layers.iter().map(|(name, _)| name).collect();
    let list = json!([{ "Config": "c.json", "RepoTags": ["a:1"], "Layers": names }]).to_string();
    let mut members = vec![("c.json", config.as_bytes()), ("manifest.json", list.as_bytes())];
    members.extend(layers.iter().filter(|(_, content)| !content.is_empty()));
    tar(&members)
}

#[test]
fn archives_of_docker_are_read() {
    let lower = tar(&[("app.wasm", &wasm("a")), ("gone.wasm", &wasm("b"))]);
    let upper = tar(&[(".wh.gone.wasm", b""), ("new.wasm", &wasm("c"))]);
    let good = archive(&[("one/layer.tar", &lower), ("two/layer.tar", &upper)], &[&lower, &upper]);
    assert_eq!(names(&good), ["/app.wasm", "/new.wasm"]);
    // Others pack the layers; the digest is that of what is in them.
    assert_eq!(names(&archive(&[("one.tar.gz", &gzip(&lower))], &[&lower])), ["/app.wasm", "/gone.wasm"]);
    let error = |layout: &[u8]| format!("{:#}", found(layout).unwrap_err());
    assert!(error(&archive(&[("one.tar", &lower)], &[&upper])).contains("not those of the digest"));
    assert!(error(&archive(&[("one.tar", &lower)], &[])).contains("digests of 0 layers, and the image has 1"));
    assert!(error(&archive(&[("one.tar", b"")], &[b""])).contains("one.tar: is not in it"));
    assert!(error(&tar(&[("manifest.json", b"{}")])).contains("manifest.json"));
}

#[test]
fn a_layer_that_two_images_of_docker_share_may_be_a_link() {
    let layer = tar(&[("app.wasm", &wasm("a"))]);
    let archive = archive(&[("one/layer.tar", &layer), ("two/layer.tar", b"")], &[&layer, &layer]);
    // Its end of two blocks of zeros makes place for the link.
    let mut with_link = Builder::new(archive[..archive.len() - 1024].to_vec());
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Symlink);
    header.set_size(0);
    with_link.append_link(&mut header, "two/layer.tar", "../one/layer.tar").unwrap();
    assert_eq!(names(&with_link.into_inner().unwrap()), ["/app.wasm"]);
}

#[test]
fn what_a_later_layer_hides_is_not_in_the_image() {
    let mut blobs = Blobs::default();
    let (a, b) = (wasm("old"), wasm("new"));
    let lower =
        tar(&[("gone.wasm", &a), ("dir/x.wasm", &a), ("kept.wasm", &a), ("opaque/y.wasm", &a), ("same.wasm", &a)]);
    let upper = tar(&[
        (".wh.gone.wasm", b""),
        (".wh.dir", b""),
        ("opaque/", b""),
        ("opaque/z.wasm", &b),
        ("opaque/.wh..wh..opq", b""),
        ("same.wasm", &b),
    ]);
    let image = blobs.image(vec![(LAYER, lower), (LAYER, upper)]);
    let layout = blobs.pack(&[image]);
    assert_eq!(names(&layout), ["/kept.wasm", "/opaque/z.wasm", "/same.wasm"]);
    let found = found(&layout).unwrap();
    assert_eq!(found[2].wasm.as_ref().unwrap(), &wasm("new"));
}

#[test]
fn text_is_told_by_its_name() {
    let mut blobs = Blobs::default();
    let files = tar(&[("a.wat", b"(module)"), ("b.txt", b"(module)"), ("c.wat", b"()")]);
    let image = blobs.image(vec![(LAYER, files)]);
    let found = found(&blobs.pack(&[image])).unwrap();
    let found: Vec<_> = found.iter().map(|found| (found.name.as_str(), found.wasm.as_deref().unwrap())).collect();
    assert_eq!(found, [("/a.wat", &b"(module)"[..]), ("/c.wat", b"()")]);
}

#[test]
fn two_images_may_use_one_name() {
    let mut blobs = Blobs::default();
    let images = ["one", "two", "one"].map(|text| blobs.image(vec![(LAYER, tar(&[("app.wasm", &wasm(text))]))]));
    let names = names(&blobs.pack(&images));
    assert!(names.len() == 2 && names[0] == "/app.wasm" && names[1].starts_with("/app.wasm ("), "{names:?}");
}

#[test]
fn a_module_beyond_the_limit_is_told_beside_the_others() {
    let mut blobs = Blobs::default();
    let large = wasm(&"x".repeat(MOST as usize));
    let image = blobs.image(vec![(LAYER, tar(&[("large.wasm", &large), ("small.wasm", &wasm("s"))]))]);
    let found = found(&blobs.pack(&[image])).unwrap();
    assert!(found[0].wasm.as_ref().unwrap_err().to_string().contains("max_module_size"));
    assert!(found[1].wasm.is_ok());
}

#[test]
fn no_image_fills_the_memory() {
    let mut blobs = Blobs::default();
    let large: Vec<_> = (0..6).map(|number| wasm(&number.to_string().repeat(MOST as usize - 8))).collect();
    let names: Vec<_> = (0..6).map(|number| format!("{number}.wasm")).collect();
    let files: Vec<_> = names.iter().zip(&large).map(|(name, wasm)| (name.as_str(), wasm.as_slice())).collect();
    // Two lie in a file system, the others beside it.
    let layers = large[2..].iter().map(|wasm| ("application/wasm", wasm.clone()));
    let layers = std::iter::once((LAYER, gzip(&tar(&files[..2])))).chain(layers).collect();
    let image = blobs.image(layers);
    let (good, bad): (Vec<_>, Vec<_>) =
        found(&blobs.pack(&[image])).unwrap().into_iter().partition(|found| found.wasm.is_ok());
    assert_eq!((good.len(), bad.len()), (4, 2));
    assert!(bad.iter().all(|bad| bad.wasm.as_ref().unwrap_err().to_string().contains("no room beside the others")));
    let small = wasm("");
    let names: Vec<_> = (0..1025).map(|number| number.to_string()).collect();
    let files: Vec<_> = names.iter().map(|name| (name.as_str(), small.as_slice())).collect();
    let mut blobs = Blobs::default();
    let (fits, does_not) = (blobs.image(vec![(LAYER, tar(&files[..1024]))]), blobs.image(vec![(LAYER, tar(&files))]));
    assert_eq!(found(&blobs.pack(&[fits])).unwrap().len(), 1024);
    assert!(format!("{:#}", found(&blobs.pack(&[does_not])).unwrap_err()).contains("more than 1024 modules"));
}

#[test]
fn what_is_wrong_is_named() {
    let mut blobs = Blobs::default();
    let image = blobs.image(vec![(LAYER, tar(&[("app.wasm", &wasm("a"))]))]);
    let good = blobs.pack(std::slice::from_ref(&image));
    let error = |layout: &[u8]| format!("{:#}", found(layout).unwrap_err());
    assert!(error(&tar(&[("a", b"b")])).contains("index.json: is not in it"));
    assert!(error(&tar(&[("index.json", b"{}")])).contains("index.json"));
    let mut changed = good.clone();
    let at = good.windows(8).position(|bytes| bytes == b"\0asm\x01\0\0\0").unwrap();
    changed[at + 8] ^= 1;
    assert!(error(&changed).contains("not those of the digest"), "{}", error(&changed));
    let mut escaping = image.clone();
    escaping["digest"] = "sha256:../../../../etc/passwd".into();
    assert!(found(&blobs.pack(&[escaping])).is_err());
    let mut longer = image;
    longer["size"] = 5.into();
    assert!(error(&blobs.pack(&[longer])).contains("the image says 5"));
    let zstd = blobs.image(vec![(LAYER, b"\x28\xb5\x2f\xfd\xff\xff".to_vec())]);
    assert!(error(&blobs.pack(&[zstd])).contains("zstd"));
}

#[test]
fn indexes_may_not_nest_without_end() {
    let mut blobs = Blobs::default();
    let mut inner = blobs.image(vec![]);
    for _ in 0..6 {
        let list = json!({ "schemaVersion": 2, "manifests": [inner] }).to_string().into_bytes();
        inner = blobs.add("application/vnd.oci.image.index.v1+json", list);
    }
    assert!(format!("{:#}", found(&blobs.pack(&[inner])).unwrap_err()).contains("indexes within"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_damage_makes_it_panic_or_lie(at in any::<prop::sample::Index>(), value: u8, cut in any::<bool>()) {
        let mut blobs = Blobs::default();
        let image = blobs.image(vec![(LAYER, gzip(&tar(&[("app.wasm", &wasm("a"))]))), ("application/wasm", wasm("b"))]);
        let mut layout = blobs.pack(&[image]);
        let at = at.index(layout.len());
        if cut { layout.truncate(at) } else { layout[at] = value }
        let good = [wasm("a"), wasm("b")];
        for found in found(&layout).into_iter().flatten() {
            prop_assert!(found.wasm.map_or(true, |wasm| good.contains(&wasm)));
        }
    }

    #[test]
    fn any_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..2000), index in "\\PC{0,200}") {
        let _ = found(&bytes);
        let _ = found(&tar(&[("index.json", index.as_bytes())]));
        let mut blobs = Blobs::default();
        let image = blobs.image(vec![(LAYER, bytes.clone()), (LAYER, gzip(&bytes)), ("application/wasm", bytes)]);
        let _ = found(&blobs.pack(&[image]));
    }
}
