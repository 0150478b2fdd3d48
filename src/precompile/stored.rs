//! The modules of an image that containerd holds, by its name.
//!
//! ```text
//!   name ─▶ target ─▶ index ─▶ … ─▶ manifests for this node ─▶ layers ─▶ modules
//!      (image/store.rs)      (image/walk.rs)              (layers.rs)
//! ```
//! All that a container of the image could run here is meant: wasm layers and files, of this node's platform and of
//! wasm's. What containerd has not pulled of the image is left out, as long as there is something.
//!
//! Called by `found.rs`. Invariant: layers pass by in pieces, documents are few and small, as for a container's image.

use std::io::{self, Read};
use std::path::PathBuf;
use std::str::FromStr as _;

use anyhow::{Context, Result, anyhow};
use oci_spec::distribution::Reference;
use tokio::runtime::Runtime;

use super::found::Found;
use super::layers::{Checked, Modules};
use crate::image::{Descriptor, Fault, Incoming, Store, images};

/// Where images are looked up, in the words of `ctr`.
#[derive(Debug)]
pub struct Containerd {
    /// containerd's gRPC socket.
    pub address: PathBuf,
    pub namespace: String,
}

impl Containerd {
    /// The modules of the image of this name, none of them larger than `most` bytes.
    pub fn modules(&self, runtime: &Runtime, name: &str, most: u64) -> Result<Vec<Found>> {
        let reference = Reference::from_str(name).map_err(|error| anyhow!("{error}"))?;
        let store = runtime.block_on(Store::connect(&self.address, &self.namespace)).map_err(|error| {
            anyhow!("{error}; start containerd, or name its gRPC socket with --address, or a file that exists")
        })?;
        // `ctr` takes names as they are; others, and people, leave out what is usual.
        let whole = reference.whole();
        let target = match runtime.block_on(store.target(name))? {
            None if whole != name => runtime.block_on(store.target(&whole))?,
            target => target,
        };
        let namespace = &self.namespace;
        let target = target.with_context(|| {
            format!(
                "containerd has no such image in the namespace {namespace:?}; `ctr --namespace {namespace} image pull \
                 {whole}`, or say with --namespace where it is (Kubernetes' images: k8s.io)"
            )
        })?;
        let images = runtime.block_on(images(&store, target)).map_err(|fault| fault.about(name))?;
        let mut modules = Modules::new(most);
        for image in images {
            let open = |layer: &Descriptor| blob(runtime, &store, name, layer);
            if let Err(error) = modules.image(&image.layers, open) {
                modules.insert(image.digest, "", Err(error))?;
            }
        }
        Ok(modules.into_found())
    }
}

fn blob<'a>(runtime: &'a Runtime, store: &Store, name: &'a str, blob: &Descriptor) -> Result<Checked<'a>> {
    Checked::new(blob, |_| {
        let incoming = runtime.block_on(store.open(blob)).map_err(|fault| fault.about(name))?;
        Ok(Box::new(Pieces { runtime, incoming, name, piece: io::Cursor::default() }))
    })
}

/// What comes from containerd, for those who read.
struct Pieces<'a> {
    runtime: &'a Runtime,
    incoming: Incoming,
    /// Of the image.
    name: &'a str,
    piece: io::Cursor<Vec<u8>>,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.piece.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            let next = self.runtime.block_on(self.incoming.next());
            match next.map_err(|fault: Fault| io::Error::other(fault.about(self.name)))? {
                Some(piece) => self.piece = io::Cursor::new(piece),
                None => return Ok(0),
            }
        }
    }
}
