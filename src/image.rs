//! Modules out of images without a root filesystem: OCI wasm artifacts, and images with wasm layers.
//!
//! ```text
//!   container ─▶ its image's name ─▶ target ─▶ index ─▶ … ─▶ manifest ─▶ wasm layers ─▶ the one ─▶ bytes, checked
//!     (store.rs: containers, images, content)  (walk.rs, document.rs)     (choose.rs)
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
use std::time::{Duration, Instant};

use tokio::sync::watch;
use troupe_actors::{ContainerId, Error, ImageModule, Images, Result, Wanted};

pub use document::Descriptor;
pub use store::{Incoming, Store};
use walk::Blobs as _;
pub use walk::{Fault, images};

/// From the first question to the last byte. A container that takes longer is not worth waiting for.
const PATIENCE: Duration = Duration::from_secs(60);

/// The images that a containerd holds.
#[derive(Debug)]
pub struct ContainerdImages {
    /// containerd's gRPC socket.
    socket: PathBuf,
    /// Turns true when the process leaves.
    leaving: watch::Sender<bool>,
}

impl ContainerdImages {
    /// Nothing is asked, nor connected to, before a container needs it.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), leaving: watch::Sender::new(false) }
    }

    /// Ends all questions that are on their way; later ones fail.
    pub fn close(&self) {
        self.leaving.send_replace(true);
    }

    async fn ask(&self, container: &ContainerId, wanted: &Wanted) -> Result<Option<ImageModule>> {
        let mut leaving = self.leaving.subscribe();
        tokio::select! {
            answer = tokio::time::timeout(PATIENCE, self.find(container, wanted)) => {
                answer.unwrap_or_else(|_| Err(late("read its image from containerd", PATIENCE)))
            }
            _ = leaving.wait_for(|leaving| *leaving) => Err(Error::ShuttingDown),
        }
    }

    async fn find(&self, container: &ContainerId, wanted: &Wanted) -> Result<Option<ImageModule>> {
        let began = Instant::now();
        let store = Store::connect(&self.socket, container.namespace()).await?;
        let Some(image) = store.image_of(container.id()).await? else { return Ok(None) };
        let about = |why: String| Error::Program(format!("image {image}: {why}"));
        let target = store.target(&image).await?.ok_or_else(|| about(GONE.to_owned()))?;
        let layers = walk::wasm_layers(&store, target).await.map_err(|error| error.about(&image))?;
        if layers.is_empty() {
            return Ok(None);
        }
        let layer = choose::choose(&layers, wanted).map_err(about)?;
        let name = choose::name(layer, wanted);
        if layer.size > wanted.max_size {
            let why = format!("has {} bytes, more than the max_module_size of {}", layer.size, wanted.max_size);
            return Err(about(format!("{name}: {why}")));
        }
        let wasm = store.read(layer).await.map_err(|error| error.about(&image))?;
        let elapsed_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        tracing::info!(%container, image, layer = layer.digest, bytes = wasm.len(), elapsed_us, "read from a layer");
        Ok(Some(ImageModule { name, wasm }))
    }
}

const GONE: &str = "it is not in containerd any more; pull or import it again";

impl Images for ContainerdImages {
    fn module(&self, container: &ContainerId, wanted: &Wanted) -> Result<Option<ImageModule>> {
        // The caller's thread is one that may block: neither guests nor the control plane wait for containerd or a hash.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Error::host("a runtime to ask containerd with", e))?;
        runtime.block_on(self.ask(container, wanted))
    }
}

/// containerd did not do `what` in time.
fn late(what: &str, patience: Duration) -> Error {
    let why = format!("no answer within {} s; is containerd overloaded or stopped?", patience.as_secs());
    Error::host(what, std::io::Error::new(std::io::ErrorKind::TimedOut, why))
}
