//! Images as registries hold them, and as nobody sane would write them, in memory.

use std::cell::Cell;
use std::collections::HashMap;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Blobs by made-up digests, and how often they were read.
#[derive(Default)]
struct Memory {
    blobs: HashMap<String, Vec<u8>>,
    reads: Cell<usize>,
}

impl Blobs for Memory {
    async fn read(&self, blob: &Descriptor) -> Result<Vec<u8>, Fault> {
        self.reads.set(self.reads.get() + 1);
        self.blobs.get(&blob.digest).cloned().ok_or_else(|| Fault::Missing(blob.digest.clone()))
    }
}

impl Memory {
    /// Stores a document under this digest and returns what leads to it.
    fn put(&mut self, digest: &str, media_type: &str, value: &Value) -> Value {
        self.blobs.insert(digest.to_owned(), value.to_string().into_bytes());
        json!({ "mediaType": media_type, "digest": digest, "size": 1 })
    }

    fn index(&mut self, digest: &str, children: &[Value]) -> Value {
        self.put(digest, INDEX, &json!({ "manifests": children }))
    }

    /// A manifest with layers of these types, whose config says this platform.
    fn manifest(&mut self, digest: &str, layers: &[&str], platform: &Value) -> Value {
        let config = self.put(&format!("config of {digest}"), "application/vnd.wasm.config.v0+json", platform);
        let layers: Vec<_> = layers
            .iter()
            .map(|kind| json!({ "mediaType": kind, "digest": format!("layer of {digest}"), "size": 1 }))
            .collect();
        self.put(digest, MANIFEST, &json!({ "config": config, "layers": layers }))
    }

    /// All that could be run here.
    fn all(&self, target: &Value) -> Result<Vec<String>, String> {
        let target: Descriptor = serde_json::from_value(target.clone()).unwrap();
        let found = futures::executor::block_on(images(self, target));
        Ok(found.map_err(|fault| fault.about("image").to_string())?.into_iter().map(|image| image.digest).collect())
    }

    fn walk(&self, target: &Value) -> Result<Vec<String>, String> {
        let target: Descriptor = serde_json::from_value(target.clone()).unwrap();
        let found = futures::executor::block_on(wasm_layers(self, target));
        let found = found.map_err(|fault| fault.about("image").to_string())?;
        Ok(found.into_iter().map(|layer| layer.digest).collect())
    }
}

fn on(descriptor: &Value, os: &str, architecture: &str) -> Value {
    let mut descriptor = descriptor.clone();
    descriptor["platform"] = json!({ "os": os, "architecture": architecture });
    descriptor
}

fn host() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

const WASM: &[&str] = &["application/wasm"];
const TAR: &[&str] = &["application/vnd.oci.image.layer.v1.tar"];

#[test]
fn an_artifact_is_a_manifest_with_wasm_layers() {
    let mut memory = Memory::default();
    let layers = ["application/wasm", "text/plain", "application/vnd.wasm.content.layer.v1+wasm"];
    let target = memory.manifest("m", &layers, &json!({}));
    assert_eq!(memory.walk(&target).unwrap(), ["layer of m", "layer of m"]);
    // The config was of no interest: nobody else could be meant.
    assert_eq!(memory.reads.get(), 1);
    let ordinary = memory.manifest("o", TAR, &json!({}));
    assert!(memory.walk(&ordinary).unwrap().is_empty());
}

#[test]
fn platforms_are_chosen_as_containerd_does() {
    let mut memory = Memory::default();
    let [native, wasi, other, tar] = [("n", WASM), ("w", WASM), ("x", WASM), ("t", TAR)]
        .map(|(name, layers)| memory.manifest(name, layers, &json!({})));
    for (children, expected) in [
        (vec![on(&wasi, "wasip1", "wasm"), on(&native, "linux", host())], Some("n")),
        // This node's has no wasm in it.
        (vec![on(&tar, "linux", host()), on(&wasi, "wasip1", "wasm")], Some("w")),
        (vec![on(&other, "linux", "s390x"), on(&wasi, "wasi", "wasm")], Some("w")),
        (vec![on(&other, "linux", "s390x"), on(&other, "unknown", "unknown")], None),
        // Among equals, the first.
        (vec![on(&wasi, "wasip1", "wasm"), on(&other, "wasip2", "wasm")], Some("w")),
        (vec![], None),
    ] {
        let target = memory.index("i", &children);
        let expected: Vec<_> = expected.iter().map(|name| format!("layer of {name}")).collect();
        assert_eq!(memory.walk(&target).unwrap(), expected, "{children:?}");
    }
}

#[test]
fn where_an_index_is_silent_the_config_speaks() {
    let mut memory = Memory::default();
    let foreign = memory.manifest("f", WASM, &json!({ "os": "linux", "architecture": "s390x" }));
    let ours = memory.manifest("o", WASM, &json!({ "os": "wasip1", "architecture": "wasm" }));
    let target = memory.index("i", &[foreign, ours]);
    assert_eq!(memory.walk(&target).unwrap(), ["layer of o"]);
}

#[test]
fn what_was_not_pulled_is_not_missed() {
    let mut memory = Memory::default();
    let ours = memory.manifest("o", WASM, &json!({}));
    let gone = json!({ "mediaType": MANIFEST, "digest": "gone", "size": 1 });
    let target = memory.index("i", &[on(&gone, "linux", host()), on(&ours, "wasip1", "wasm")]);
    assert_eq!(memory.walk(&target).unwrap(), ["layer of o"]);
    let target = memory.index("i", &[on(&gone, "wasip1", "wasm")]);
    assert!(memory.walk(&target).unwrap_err().contains("image image: gone is not in containerd's content store"));
    assert!(memory.walk(&gone).unwrap_err().contains("import the image again"));
}

#[test]
fn all_that_could_run_here_is_found_once() {
    let mut memory = Memory::default();
    let [native, wasi, foreign] =
        [("n", TAR), ("w", WASM), ("f", WASM)].map(|(name, layers)| memory.manifest(name, layers, &json!({})));
    let silent = memory.manifest("s", WASM, &json!({ "os": "wasip1", "architecture": "wasm" }));
    let elsewhere = memory.manifest("e", WASM, &json!({ "os": "linux", "architecture": "s390x" }));
    let gone = json!({ "mediaType": MANIFEST, "digest": "gone", "size": 1 });
    let children = [
        silent,
        elsewhere,
        on(&wasi, "wasip1", "wasm"),
        on(&foreign, "linux", "s390x"),
        on(&gone, "wasip2", "wasm"),
        on(&native, "linux", host()),
        on(&wasi, "wasip2", "wasm"),
    ];
    let target = memory.index("i", &children);
    assert_eq!(memory.all(&target).unwrap(), ["n", "w", "s"]);
    assert_eq!(memory.all(&native).unwrap(), ["n"]);
    let target = memory.index("i", &[on(&gone, "wasip1", "wasm"), on(&foreign, "linux", "s390x")]);
    assert!(memory.all(&target).unwrap_err().contains("gone is not in containerd's content store"));
    let target = memory.index("i", &[on(&foreign, "linux", "s390x")]);
    assert!(memory.all(&target).unwrap().is_empty());
}

#[test]
fn several_levels_are_read_and_a_tower_is_not() {
    let mut memory = Memory::default();
    let mut top = memory.manifest("m", WASM, &json!({}));
    for level in 0..=MAX_DEPTH {
        assert_eq!(memory.walk(&top).unwrap(), ["layer of m"], "{level}");
        top = memory.index(&format!("i{level}"), &[top]);
    }
    assert!(memory.walk(&top).unwrap_err().contains("lead to too many others"));
}

#[test]
fn an_index_that_leads_to_itself_ends() {
    let mut memory = Memory::default();
    let own = json!({ "mediaType": INDEX, "digest": "i", "size": 1 });
    let target = memory.index("i", &vec![own; 1000]);
    assert!(memory.walk(&target).unwrap_err().contains("too many others"));
    assert!(memory.reads.get() <= MAX_DOCUMENTS, "{}", memory.reads.get());
    // Wide instead of deep.
    let tar = memory.manifest("t", TAR, &json!({}));
    let wide = memory.index("w", &vec![on(&tar, "linux", host()); 1000]);
    assert!(memory.walk(&wide).unwrap_err().contains("too many others"));
}

#[test]
fn what_is_too_large_or_something_else_is_not_read() {
    let mut memory = Memory::default();
    let mut target = memory.manifest("m", WASM, &json!({}));
    target["size"] = json!(MAX_DOCUMENT + 1);
    assert!(memory.walk(&target).unwrap_err().contains("more than the 4194304"));
    target["size"] = json!(1);
    target["mediaType"] = json!("application/octet-stream");
    assert!(memory.walk(&target).unwrap_err().contains("neither an index nor a manifest"));
    assert_eq!(memory.reads.get(), 0);
}

/// JSON that looks a little like a document.
fn document() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<i64>().prop_map(Value::from),
        prop::sample::select(vec!["a", "b", "c", INDEX, MANIFEST, "application/wasm", "linux", "wasm", "wasip1"])
            .prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 64, 6, |inner| {
        let key = prop::sample::select(vec![
            "mediaType",
            "digest",
            "size",
            "manifests",
            "config",
            "layers",
            "platform",
            "os",
            "architecture",
            "annotations",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((key, inner), 0..6).prop_map(|pairs| pairs.into_iter().collect()),
        ]
    })
}

proptest! {
    #[test]
    fn no_image_is_too_strange(a in document(), b in document(), c in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut memory = Memory::default();
        memory.put("a", INDEX, &a);
        memory.put("b", MANIFEST, &b);
        memory.blobs.insert("c".into(), c);
        for (digest, kind) in [("a", INDEX), ("a", MANIFEST), ("b", MANIFEST), ("c", INDEX), ("c", MANIFEST)] {
            memory.reads.set(0);
            let target = json!({ "mediaType": kind, "digest": digest, "size": 1 });
            let _ = (memory.walk(&target), memory.all(&target));
            prop_assert!(memory.reads.get() <= 4 * MAX_DOCUMENTS);
        }
    }

    #[test]
    fn no_text_is_too_strange(text in any::<String>()) {
        let _ = Document::parse(INDEX, text.as_bytes());
        let _ = Document::parse(MANIFEST, text.as_bytes());
        let _ = Platform::of_config(text.as_bytes());
    }
}
