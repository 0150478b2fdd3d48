//! What the containers of a pod share: the namespaces of their anchor thread, and the sockets made inside them.
//!
//! ```text
//!  Create ─▶ Role (annotations of CRI) ─▶ Pods::enter ─┬─ a sandbox, or alone ─▶ a new Anchor
//!                                                      └─ a member ───────────▶ its sandbox's Anchor
//!                                             Membership ─▶ tid (the pid), Network (sockets)
//! ```
//! A container outside a pod is a pod of its own.

mod anchor;
mod netns;
mod role;
mod sockets;
mod table;

#[cfg(test)]
pub use anchor::Anchor;
pub use role::Role;
pub use sockets::{Network, listen};
pub use table::{Membership, Pods};
