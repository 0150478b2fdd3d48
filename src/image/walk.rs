//! From an image's target to its wasm layers, whatever lies between.
//!
//! ```text
//!   index ─┬─ linux/amd64 (this node's, which containerd unpacks)  first
//!          ├─ wasip1/wasm                                          then
//!          ├─ no platform: its config says                         then
//!          └─ others                                               never
//! ```
//! The first manifest that has wasm layers is the one. Invariant: few documents of bounded size are read, whatever they say.

use troupe_actors::Error;

use super::document::{Descriptor, Document, MAX_DOCUMENT, Platform};

/// Indexes in indexes exist (two levels); more is somebody's game.
const MAX_DEPTH: usize = 4;
/// An index has one manifest a platform, of which few are of interest.
const MAX_DOCUMENTS: usize = 32;

/// Whoever has the blobs.
pub trait Blobs {
    /// The bytes of a blob, as many and with the digest that its descriptor says.
    async fn read(&self, blob: &Descriptor) -> Result<Vec<u8>, Fault>;
}

/// Why an image cannot be read.
#[derive(Debug)]
pub enum Fault {
    /// The blob of this digest is not there.
    Missing(String),
    /// The image is wrong, in words.
    Wrong(String),
    /// Nobody can be asked.
    Host(Error),
}

impl Fault {
    /// The same for whoever wanted this image.
    pub fn about(self, image: &str) -> Error {
        match self {
            Self::Missing(digest) => Error::Program(format!(
                "image {image}: {digest} is not in containerd's content store; pull or import the image again, with its wasm \
                 platform (--all-platforms) and CRI's option discard_unpacked_layers off"
            )),
            Self::Wrong(why) => Error::Program(format!("image {image}: {why}")),
            Self::Host(error) => error,
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Host(error)
    }
}

/// A document that may be worth reading.
struct Candidate {
    descriptor: Descriptor,
    depth: usize,
    /// An index leads to it without saying where it runs.
    is_unsaid: bool,
}

/// The wasm layers of the image, in their order; none when it has none.
pub async fn wasm_layers(blobs: &impl Blobs, target: Descriptor) -> Result<Vec<Descriptor>, Fault> {
    let mut next = vec![Candidate { descriptor: target, depth: 0, is_unsaid: false }];
    let mut missing = None;
    let mut documents = 0;
    while let Some(candidate) = next.pop() {
        documents += 1;
        if documents > MAX_DOCUMENTS || candidate.depth > MAX_DEPTH {
            let limits = format!("at most {MAX_DOCUMENTS} documents, {MAX_DEPTH} levels deep");
            return Err(Fault::Wrong(format!("its indexes lead to too many others; read are {limits}")));
        }
        let document = match document(blobs, &candidate.descriptor).await {
            Ok(document) => document,
            // An image is pulled for one platform, so the others' manifests are not there.
            Err(Fault::Missing(digest)) if candidate.depth > 0 => {
                missing.get_or_insert(digest);
                continue;
            }
            Err(fault) => return Err(fault),
        };
        match document {
            Document::Index(children) => next.extend(best_last(children, candidate.depth + 1)),
            Document::Manifest { config, layers } => {
                let layers: Vec<_> = layers.into_iter().filter(Descriptor::is_wasm).collect();
                if !layers.is_empty() && (!candidate.is_unsaid || is_for_us(blobs, &config).await?) {
                    return Ok(layers);
                }
            }
        }
    }
    missing.map_or(Ok(Vec::new()), |digest| Err(Fault::Missing(digest)))
}

async fn document(blobs: &impl Blobs, descriptor: &Descriptor) -> Result<Document, Fault> {
    if !descriptor.is_document() {
        let Descriptor { media_type, digest, .. } = descriptor;
        return Err(Fault::Wrong(format!("{digest}: neither an index nor a manifest, but {media_type:?}")));
    }
    let text = small(blobs, descriptor).await?;
    Document::parse(&descriptor.media_type, &text).map_err(|why| Fault::Wrong(format!("{}: {why}", descriptor.digest)))
}

/// The children that can be meant, the best one last.
fn best_last(children: Vec<Descriptor>, depth: usize) -> impl Iterator<Item = Candidate> {
    let rank = |child: &Descriptor| child.platform.as_ref().map_or(Some(2), Platform::rank);
    let mut ranked: Vec<_> = children
        .into_iter()
        .filter(Descriptor::is_document)
        .filter_map(|descriptor| Some((rank(&descriptor)?, descriptor)))
        .collect();
    // Among equals the first wins: the order of sorting is stable, and the whole is turned round.
    ranked.sort_by_key(|(rank, _)| *rank);
    let candidate = move |(_, descriptor): (u8, Descriptor)| {
        let is_unsaid = descriptor.platform.is_none();
        Candidate { descriptor, depth, is_unsaid }
    };
    ranked.into_iter().rev().map(candidate)
}

/// As its config says.
async fn is_for_us(blobs: &impl Blobs, config: &Descriptor) -> Result<bool, Fault> {
    let text = small(blobs, config).await?;
    let platform = Platform::of_config(&text).map_err(|why| Fault::Wrong(format!("{}: {why}", config.digest)))?;
    Ok(platform.rank().is_some())
}

async fn small(blobs: &impl Blobs, blob: &Descriptor) -> Result<Vec<u8>, Fault> {
    if blob.size > MAX_DOCUMENT {
        let why = format!("{} bytes, more than the {MAX_DOCUMENT} that a document may have", blob.size);
        return Err(Fault::Wrong(format!("{}: {why}", blob.digest)));
    }
    blobs.read(blob).await
}

#[cfg(test)]
#[path = "walk_tests.rs"]
mod tests;
