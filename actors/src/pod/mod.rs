//! What the containers of a pod share: today the namespaces of their anchor thread.
//!
//! A container outside a pod is a pod of its own.

mod anchor;

pub use anchor::Anchor;
