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

/// A manifest that was reached.
pub struct Image {
    pub digest: String,
    pub layers: Vec<Descriptor>,
    config: Descriptor,
    is_unsaid: bool,
}

/// The wasm layers of the image, in their order; none when it has none.
pub async fn wasm_layers(blobs: &impl Blobs, target: Descriptor) -> Result<Vec<Descriptor>, Fault> {
    let mut walk = Walk::new(blobs, target);
    while let Some(mut image) = walk.next().await? {
        image.layers.retain(Descriptor::is_wasm);
        if !image.layers.is_empty() && walk.is_for_us(&image).await? {
            return Ok(image.layers);
        }
    }
    walk.end(Vec::new())
}

/// All that this node could run of the image, the best first; what was not pulled is left out if something was.
pub async fn images(blobs: &impl Blobs, target: Descriptor) -> Result<Vec<Image>, Fault> {
    let mut walk = Walk::new(blobs, target);
    let mut images: Vec<Image> = Vec::new();
    while let Some(image) = walk.next().await? {
        if images.iter().all(|known| known.digest != image.digest) && walk.is_for_us(&image).await? {
            images.push(image);
        }
    }
    if images.is_empty() { walk.end(images) } else { Ok(images) }
}

/// On its way from the target to the manifests, the best first.
struct Walk<'a, B> {
    blobs: &'a B,
    next: Vec<Candidate>,
    /// How many were read.
    documents: usize,
    /// The first that is not there.
    missing: Option<String>,
}

impl<'a, B: Blobs> Walk<'a, B> {
    fn new(blobs: &'a B, target: Descriptor) -> Self {
        let next = vec![Candidate { descriptor: target, depth: 0, is_unsaid: false }];
        Self { blobs, next, documents: 0, missing: None }
    }

    async fn next(&mut self) -> Result<Option<Image>, Fault> {
        while let Some(candidate) = self.next.pop() {
            self.documents += 1;
            if self.documents > MAX_DOCUMENTS || candidate.depth > MAX_DEPTH {
                let limits = format!("at most {MAX_DOCUMENTS} documents, {MAX_DEPTH} levels deep");
                return Err(Fault::Wrong(format!("its indexes lead to too many others; read are {limits}")));
            }
            let Candidate { descriptor, depth, is_unsaid } = candidate;
            match document(self.blobs, &descriptor).await {
                Ok(Document::Index(children)) => self.next.extend(best_last(children, depth + 1)),
                Ok(Document::Manifest { config, layers }) => {
                    return Ok(Some(Image { digest: descriptor.digest, layers, config, is_unsaid }));
                }
                // An image is pulled for one platform, so the others' manifests are not there.
                Err(Fault::Missing(digest)) if depth > 0 => drop(self.missing.get_or_insert(digest)),
                Err(fault) => return Err(fault),
            }
        }
        Ok(None)
    }

    /// As its index says, or else its config.
    async fn is_for_us(&self, image: &Image) -> Result<bool, Fault> {
        if !image.is_unsaid {
            return Ok(true);
        }
        let text = small(self.blobs, &image.config).await?;
        let platform =
            Platform::of_config(&text).map_err(|why| Fault::Wrong(format!("{}: {why}", image.config.digest)))?;
        Ok(platform.rank().is_some())
    }

    /// Nothing was found; perhaps because it is not there.
    fn end<T>(self, nothing: T) -> Result<T, Fault> {
        self.missing.map_or(Ok(nothing), |digest| Err(Fault::Missing(digest)))
    }
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
