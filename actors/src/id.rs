//! The name of a container.

use std::fmt;
use std::sync::Arc;

/// A container's id is unique within its containerd namespace only, and a process may serve several of those.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerId {
    namespace: Arc<str>,
    id: Arc<str>,
}

impl ContainerId {
    /// Container `id` of containerd namespace `namespace`.
    pub fn new(namespace: &str, id: &str) -> Self {
        Self { namespace: namespace.into(), id: id.into() }
    }

    /// The containerd namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The id within it.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.id)
    }
}
