//! The pods of the process.
//!
//! A sandbox brings its pod here when it is created and takes it away when it is deleted; its members look it up in between.
//! A member is never let into namespaces by the path that its spec has for them: that names a thread by a number, which
//! may be somebody else's by now.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::anchor::Anchor;
use super::role::Role;
use super::sockets::Network;
use crate::ContainerId;
use crate::bundle::Bundle;
use crate::error::{Error, Result};

/// The pods that have a sandbox here.
#[derive(Debug, Default)]
pub struct Pods(Mutex<HashMap<ContainerId, Arc<Anchor>>>);

impl Pods {
    /// Lets a container into its pod; a sandbox, or a container without one, brings its own. Blocks for as long as it
    /// takes to make namespaces.
    ///
    /// # Errors
    /// `Host` when a namespace cannot be made or entered, `Invalid` when the sandbox is not here.
    pub fn enter(self: &Arc<Self>, id: &ContainerId, bundle: &Bundle) -> Result<Membership> {
        let anchor = || Anchor::start(&bundle.namespaces, bundle.hostname.as_deref()).map(Arc::new);
        match &bundle.role {
            Role::Alone => Ok(Membership { anchor: anchor()?, brought: None }),
            Role::Sandbox => {
                let anchor = anchor()?;
                self.lock().insert(id.clone(), Arc::clone(&anchor));
                Ok(Membership { anchor, brought: Some(Brought { pods: Arc::clone(self), id: id.clone() }) })
            }
            Role::Member(sandbox) => {
                let sandbox = ContainerId::new(id.namespace(), sandbox);
                let anchor = self.lock().get(&sandbox).cloned().ok_or_else(|| gone(&sandbox))?;
                Ok(Membership { anchor, brought: None })
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ContainerId, Arc<Anchor>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn gone(sandbox: &ContainerId) -> Error {
    Error::invalid(format!(
        "the pod's sandbox {sandbox} is not in this process: it was deleted, or ended with the process that held it; \
         remove the pod and make it anew"
    ))
}

/// A container's part in its pod. The anchor ends with the last one: drop it on a blocking thread.
#[derive(Debug)]
pub struct Membership {
    anchor: Arc<Anchor>,
    /// Dropped with it.
    #[expect(dead_code, reason = "it is there to be dropped")]
    brought: Option<Brought>,
}

impl Membership {
    /// The anchor thread's id: the pid that containerd is told.
    pub fn tid(&self) -> u32 {
        self.anchor.tid()
    }

    /// The pod's network.
    pub fn network(&self) -> Network {
        self.anchor.network()
    }
}

/// The pod that a sandbox brought: nobody enters it once the sandbox is gone.
#[derive(Debug)]
struct Brought {
    pods: Arc<Pods>,
    id: ContainerId,
}

impl Drop for Brought {
    fn drop(&mut self) {
        let gone = self.pods.lock().remove(&self.id);
        // Ending an anchor takes a moment, which others need not wait for.
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::anchor::tests::{await_end, exists};

    fn bundle(role: Role) -> Bundle {
        Bundle { role, ..Bundle::for_tests() }
    }

    #[test]
    fn members_share_the_anchor_of_their_sandbox_until_the_last_one_leaves() {
        let pods = Arc::<Pods>::default();
        let (sandbox, member) = (ContainerId::new("ns", "p"), ContainerId::new("ns", "c"));
        let enter_member = |namespace| pods.enter(&ContainerId::new(namespace, "c"), &bundle(Role::Member("p".into())));
        let error = enter_member("ns").unwrap_err().to_string();
        assert!(error.contains("sandbox ns/p is not in this process"), "{error}");

        let brought = pods.enter(&sandbox, &bundle(Role::Sandbox)).unwrap();
        let entered = pods.enter(&member, &bundle(Role::Member("p".into()))).unwrap();
        assert_eq!(brought.tid(), entered.tid());
        assert!(enter_member("another").is_err(), "ids are unique in their namespace only");
        let alone = pods.enter(&ContainerId::new("ns", "p"), &bundle(Role::Alone)).unwrap();
        assert_ne!(alone.tid(), brought.tid());

        drop(brought);
        assert!(enter_member("ns").is_err());
        let tid = entered.tid();
        assert!(exists(tid));
        drop(entered);
        await_end(tid);
    }
}
