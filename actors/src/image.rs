//! What an image holds besides a root filesystem: modules among its layers.
//!
//! They lie in containerd, and only the edge knows how to ask for them: it implements [`Images`] and hands it to every
//! container. Asked by `container` alone, and only when the root filesystem has no file of the name.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crate::ContainerId;
use crate::error::Result;

/// The images of the containers.
pub trait Images: fmt::Debug + Send + Sync {
    /// The module that a container wants of its image, found and not read yet; `None` when no layer of the image is wasm.
    /// Blocks, with a deadline of its own: for blocking threads.
    ///
    /// # Errors
    /// `Program` when the image is at fault, or has no single answer; `Host` when containerd cannot be asked.
    fn module(&self, container: &ContainerId, wanted: &Wanted) -> Result<Option<ImageModule>>;
}

/// Which module is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// As the user wrote it, for messages. It may also be a number: the position among the modules.
    pub name: String,
    /// Where a file of this name could be, best first; each as [`absolute`] makes it. Empty: the image's only module.
    pub paths: Vec<PathBuf>,
    /// More bytes are refused before any of them is read.
    pub max_size: u64,
}

/// A module of an image.
#[derive(Debug, Clone)]
pub struct ImageModule {
    /// What messages call it.
    pub name: String,
    pub content: Arc<dyn Content>,
}

/// The bytes of a module, where they lie. Their digest tells whether they have to be read at all: code that was compiled
/// from the same bytes may be at hand.
pub trait Content: fmt::Debug + Send + Sync {
    /// The SHA-256 of the bytes, as the image's manifest lists it.
    fn digest(&self) -> [u8; 32];

    /// The bytes, which have this digest. Blocks, with a deadline of its own.
    ///
    /// # Errors
    /// As [`Images::module`].
    fn read(&self) -> Result<Vec<u8>>;
}

/// The path from `/` on, without `.` and `..`. By its words only: there is no file system to ask about links.
pub fn absolute(path: &Path) -> PathBuf {
    let mut absolute = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => absolute.push(name),
            // The root is its own parent.
            Component::ParentDir => drop(absolute.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    absolute
}
