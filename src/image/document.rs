//! The JSON documents of an image: indexes, manifests, and of the config just the platform.
//!
//! Pure, and lenient where containerd is: fields that do not matter here may hold anything. Not lenient where two readers
//! could see two images in one document: a text that is both index and manifest is neither.

use std::collections::HashMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Manifests and indexes are kilobytes. containerd itself reads up to 8 MiB; a registry need not take more than 4.
pub const MAX_DOCUMENT: u64 = 4 << 20;

const INDEXES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
const MANIFESTS: [&str; 2] =
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];

/// The title that builders give a layer: the name of the file it was made of.
const TITLE: &str = "org.opencontainers.image.title";

/// What a document says of another, or of a layer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: String,
    pub size: u64,
    #[serde(default)]
    pub annotations: Option<HashMap<String, String>>,
    #[serde(default)]
    pub platform: Option<Platform>,
}

/// Where something runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Platform {
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub architecture: String,
}

/// One of the two documents that lead to layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    Index(Vec<Descriptor>),
    Manifest { config: Descriptor, layers: Vec<Descriptor> },
}

impl Descriptor {
    /// Index or manifest; everything else is of no use here.
    pub fn is_document(&self) -> bool {
        INDEXES.contains(&self.media_type.as_str()) || MANIFESTS.contains(&self.media_type.as_str())
    }

    /// `application/wasm` of the OCI artifact, and what came before it: `application/vnd.bytecodealliance.wasm.component.
    /// layer.v0+wasm`, `application/vnd.wasm.content.layer.v1+wasm`.
    pub fn is_wasm(&self) -> bool {
        self.media_type == "application/wasm" || self.media_type.ends_with("+wasm")
    }

    /// The hexadecimal digits of its digest, which has to be one of sha256.
    ///
    /// # Errors
    /// In words, with the digest.
    pub fn hex(&self) -> Result<&str, String> {
        let wrong = |why: &str| format!("the digest {:?} {why}", self.digest);
        let hex = self.digest.strip_prefix("sha256:");
        let hex = hex.ok_or_else(|| wrong("is not one of sha256, which is needed"))?;
        if hex.len() != 64 || !hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(wrong("is not 64 hexadecimal digits"));
        }
        Ok(hex)
    }

    /// The digest itself.
    ///
    /// # Errors
    /// As [`Descriptor::hex`].
    pub fn sum(&self) -> Result<[u8; 32], String> {
        let hex = self.hex()?;
        let mut sum = [0; 32];
        for (byte, digits) in sum.iter_mut().zip(hex.as_bytes().chunks(2)) {
            *byte = digits.iter().fold(0, |byte, digit| byte << 4 | (*digit as char).to_digit(16).unwrap_or(0) as u8);
        }
        Ok(sum)
    }

    /// The name of the file that the layer was made of.
    pub fn title(&self) -> Option<&str> {
        self.annotations.as_ref()?.get(TITLE).map(String::as_str).filter(|title| !title.is_empty())
    }
}

impl Document {
    /// Reads what a descriptor of this media type led to.
    ///
    /// # Errors
    /// In words, without the document's name.
    pub fn parse(media_type: &str, text: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Raw {
            #[serde(default)]
            media_type: Option<String>,
            #[serde(default)]
            manifests: Option<Vec<Descriptor>>,
            #[serde(default)]
            config: Option<Descriptor>,
            #[serde(default)]
            layers: Option<Vec<Descriptor>>,
        }
        let raw: Raw = object(text).map_err(|why| format!("not a valid document: {why}"))?;
        if let Some(own) = raw.media_type.filter(|own| own != media_type) {
            return Err(format!("it calls itself {own:?}, but whoever leads to it {media_type:?}"));
        }
        match (INDEXES.contains(&media_type), raw.manifests, raw.config, raw.layers) {
            (true, manifests, None, None) => Ok(Self::Index(manifests.unwrap_or_default())),
            (false, None, Some(config), layers) => Ok(Self::Manifest { config, layers: layers.unwrap_or_default() }),
            (false, None, None, _) => Err("a manifest without a config".to_owned()),
            _ => Err("it has the parts of both an index and a manifest".to_owned()),
        }
    }
}

impl Platform {
    /// Reads the part of a config that says where the image runs: an image's and a wasm artifact's have the same two
    /// fields.
    ///
    /// # Errors
    /// In words, without the config's name.
    pub fn of_config(text: &[u8]) -> Result<Self, String> {
        object(text).map_err(|why| format!("not a valid config: {why}"))
    }

    /// How much we would like it, the least first: what containerd itself chooses, then wasm. `None`: not for this node.
    pub fn rank(&self) -> Option<u8> {
        match (self.os.as_str(), self.architecture.as_str()) {
            ("linux", architecture) if architecture == host_architecture() => Some(0),
            ("wasi" | "wasip1" | "wasip2" | "wasip3", "wasm" | "wasm32") => Some(1),
            // A config of a tool that does not say.
            ("", "") => Some(2),
            _ => None,
        }
    }
}

/// A JSON object and nothing else: serde would read the fields out of an array, too.
fn object<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    if !text.trim_ascii_start().starts_with(b"{") {
        return Err("it is not a JSON object".to_owned());
    }
    serde_json::from_slice(text).map_err(|error| error.to_string())
}

/// In the words of Go, which are those of images.
fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
        "powerpc64" => "ppc64",
        "loongarch64" => "loong64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = INDEXES[0];
    const MANIFEST: &str = MANIFESTS[0];
    const CONFIG: &str = r#""config":{"mediaType":"c","digest":"d","size":1}"#;

    fn parse(media_type: &str, text: &str) -> Result<Document, String> {
        Document::parse(media_type, text.as_bytes())
    }

    #[test]
    fn both_documents_are_read() {
        let text = r#"{"schemaVersion":2,"manifests":[{"mediaType":"m","digest":"d","size":7,"platform":
            {"os":"wasip1","architecture":"wasm","os.features":[1]},"annotations":null,"unknown":{}}]}"#;
        let Ok(Document::Index(children)) = parse(INDEX, text) else { panic!("no index") };
        assert_eq!(children[0].platform.as_ref().unwrap().rank(), Some(1));
        assert_eq!(parse(INDEX, r#"{"manifests":null}"#), Ok(Document::Index(Vec::new())));
        let text = format!(
            r#"{{"mediaType":"{MANIFEST}",{CONFIG},"layers":[{{"mediaType":"application/wasm","digest":"d","size":9,
            "annotations":{{"{TITLE}":"app.wasm"}}}}]}}"#
        );
        let Ok(Document::Manifest { layers, .. }) = parse(MANIFEST, &text) else { panic!("no manifest") };
        assert!(layers[0].is_wasm() && layers[0].title() == Some("app.wasm") && layers[0].size == 9);
    }

    #[test]
    fn what_has_two_readings_is_refused() {
        for (media_type, text, words) in [
            (INDEX, "[]".to_owned(), "not a valid"),
            (INDEX, "{".to_owned(), "not a valid"),
            (INDEX, r#"{"manifests":[{"digest":"d","size":-1}]}"#.to_owned(), "not a valid"),
            (INDEX, r#"{"manifests":[{"digest":"d","size":1,"size":2}]}"#.to_owned(), "duplicate"),
            (INDEX, format!("{{{CONFIG}}}"), "both"),
            (INDEX, format!(r#"{{"mediaType":"{MANIFEST}"}}"#), "calls itself"),
            (MANIFEST, "{}".to_owned(), "without a config"),
            (MANIFEST, format!(r#"{{{CONFIG},"manifests":[]}}"#), "both"),
        ] {
            let error = parse(media_type, &text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn layers_are_told_by_their_types() {
        for (media_type, wasm) in [
            ("application/wasm", true),
            ("application/vnd.bytecodealliance.wasm.component.layer.v0+wasm", true),
            ("application/vnd.wasm.content.layer.v1+wasm", true),
            ("application/vnd.oci.image.layer.v1.tar+gzip", false),
            ("application/vnd.wasm.config.v0+json", false),
            ("", false),
        ] {
            assert_eq!(Descriptor { media_type: media_type.into(), ..Default::default() }.is_wasm(), wasm);
        }
    }

    #[test]
    fn platforms_are_preferred_as_containerd_does() {
        let rank = |os: &str, architecture: &str| Platform { os: os.into(), architecture: architecture.into() }.rank();
        assert_eq!(rank("linux", host_architecture()), Some(0));
        assert_eq!(rank("wasi", "wasm"), Some(1));
        assert_eq!(rank("wasip1", "wasm"), Some(1));
        assert_eq!(rank("", ""), Some(2));
        assert_eq!(rank("windows", host_architecture()), None);
        assert_eq!(rank("unknown", "unknown"), None);
        // Wants a browser.
        assert_eq!(rank("js", "wasm"), None);
        assert_eq!(rank("linux", "s390x"), None);
        let artifact = br#"{"created":"x","architecture":"wasm","os":"wasip2","layerDigests":[],"component":null}"#;
        assert_eq!(Platform::of_config(artifact).unwrap().rank(), Some(1));
        for text in ["[]", "nonsense", "", "{"] {
            assert!(Platform::of_config(text.as_bytes()).unwrap_err().contains("not a valid config"), "{text}");
        }
    }
}
