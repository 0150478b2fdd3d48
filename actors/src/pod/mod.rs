//! What the containers of a pod share: the namespaces of their anchor thread, and the sockets made inside them.
//!
//! A container outside a pod is a pod of its own.

mod anchor;
mod sockets;

pub use anchor::Anchor;
pub use sockets::{Network, listen};
