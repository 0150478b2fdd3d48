//! Modules out of images without a root filesystem: OCI wasm artifacts, and images with wasm layers.
//!
//! ```text
//!   container ─▶ its image's name ─▶ target ─▶ index ─▶ … ─▶ manifest ─▶ wasm layers ─▶ the one ─▶ its size, asked for
//!     (store.rs: containers, images, content)  (walk.rs, document.rs)     (choose.rs)       ─▶ bytes, checked, if needed
//! ```
//! Everything is asked of containerd, over its gRPC socket, and only for a container whose root filesystem does not hold
//! the program. So each question has a connection, a runtime and a deadline of its own, and a process that runs ordinary
//! images never has any of them. What is read is as hostile as the registry it came from: sizes are checked before,
//! digests after, and documents are few, small and flat.
//!
//! The verb `compile` asks for images by their names, with the same store and walk (`precompile/stored.rs`).

mod choose;
mod document;
mod store;
mod walk;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use troupe_actors::{ContainerId, Content, Error, ImageModule, Images, Result, Wanted};

pub use document::Descriptor;
pub use store::{Incoming, Store};
use walk::Blobs as _;
pub use walk::{Fault, images};

/// From the first question to the last byte. A container that takes longer is not worth waiting for.
const PATIENCE: Duration = Duration::from_secs(60);

/// The images that a containerd holds.
#[derive(Debug)]
pub struct ContainerdImages {
    containerd: Containerd,
    /// Turns true when the process leaves.
    leaving: watch::Sender<bool>,
}

/// Where to ask, and until when.
#[derive(Debug, Clone)]
struct Containerd {
    /// containerd's gRPC socket.
    socket: PathBuf,
    leaving: watch::Receiver<bool>,
}

impl ContainerdImages {
    /// Nothing is asked, nor connected to, before a container needs it.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        let (leaving, told) = watch::channel(false);
        Self { containerd: Containerd { socket: socket.into(), leaving: told }, leaving }
    }

    /// Ends all questions that are on their way; later ones fail.
    pub fn close(&self) {
        self.leaving.send_replace(true);
    }
}

impl Containerd {
    /// Asks, on a thread that may block: neither guests nor the control plane wait for containerd or a hash.
    fn ask<T>(&self, question: impl Future<Output = Result<T>>) -> Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Error::host("a runtime to ask containerd with", e))?;
        let mut leaving = self.leaving.clone();
        runtime.block_on(async {
            tokio::select! {
                answer = tokio::time::timeout(PATIENCE, question) => {
                    answer.unwrap_or_else(|_| Err(late("read its image from containerd", PATIENCE)))
                }
                _ = leaving.wait_for(|leaving| *leaving) => Err(Error::ShuttingDown),
            }
        })
    }

    async fn find(&self, container: &ContainerId, wanted: &Wanted) -> Result<Option<ImageModule>> {
        let store = Store::connect(&self.socket, container.namespace()).await?;
        let Some(image) = store.image_of(container.id()).await? else { return Ok(None) };
        let about = |why: String| Error::Program(format!("image {image}: {why}"));
        let target = store.target(&image).await?.ok_or_else(|| about(GONE.to_owned()))?;
        let layers = walk::wasm_layers(&store, target).await.map_err(|error| error.about(&image))?;
        if layers.is_empty() {
            return Ok(None);
        }
        let blob = choose::choose(&layers, wanted).map_err(about)?;
        let name = choose::name(blob, wanted);
        if blob.size > wanted.max_size {
            let why = format!("has {} bytes, more than the max_module_size of {}", blob.size, wanted.max_size);
            return Err(about(format!("{name}: {why}")));
        }
        let sum = blob.sum().map_err(about)?;
        // Whether it is read or not: this namespace has it, and it is as large as it says.
        store.check(blob).await.map_err(|error| error.about(&image))?;
        let (containerd, blob) = (self.clone(), blob.clone());
        let namespace = container.namespace().to_owned();
        Ok(Some(ImageModule { name, content: Arc::new(Layer { containerd, namespace, image, blob, sum }) }))
    }
}

/// A wasm layer that containerd holds.
#[derive(Debug)]
struct Layer {
    containerd: Containerd,
    namespace: String,
    /// For messages.
    image: String,
    blob: Descriptor,
    sum: [u8; 32],
}

impl Layer {
    async fn bytes(&self) -> Result<Vec<u8>> {
        let began = Instant::now();
        let store = Store::connect(&self.containerd.socket, &self.namespace).await?;
        let wasm = store.read(&self.blob).await.map_err(|error| error.about(&self.image))?;
        let elapsed_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        tracing::info!(
            image = self.image,
            layer = self.blob.digest,
            bytes = wasm.len(),
            elapsed_us,
            "read from a layer"
        );
        Ok(wasm)
    }
}

impl Content for Layer {
    fn digest(&self) -> [u8; 32] {
        self.sum
    }

    fn read(&self) -> Result<Vec<u8>> {
        self.containerd.ask(self.bytes())
    }
}

const GONE: &str = "it is not in containerd any more; pull or import it again";

impl Images for ContainerdImages {
    fn module(&self, container: &ContainerId, wanted: &Wanted) -> Result<Option<ImageModule>> {
        self.containerd.ask(self.containerd.find(container, wanted))
    }
}

/// containerd did not do `what` in time.
fn late(what: &str, patience: Duration) -> Error {
    let why = format!("no answer within {} s; is containerd overloaded or stopped?", patience.as_secs());
    Error::host(what, std::io::Error::new(std::io::ErrorKind::TimedOut, why))
}
