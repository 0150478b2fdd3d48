//! The end of a container behind a process of ours that was lost. Blocks: for the verb `delete`, and for a failed create.

use std::path::Path;
use std::time::Duration;

use ::runc::options::DeleteOpts;

use super::runc::Call;
use crate::error::Result;

/// After a create that failed there is little to remove.
const SHORT: Duration = Duration::from_secs(10);

/// Ends the native container of a bundle, its processes, its cgroup and runc's state of it; nothing to do is fine.
///
/// # Errors
/// With what runc says.
pub fn clean_up(bundle: &Path, within: Duration) -> Result<()> {
    match Call::read(bundle) {
        Some(call) => delete(&call, within),
        None => Ok(()),
    }
}

/// After a failed create.
pub(super) fn remove(call: &Call) {
    if let Err(error) = delete(call, SHORT) {
        tracing::warn!(%error, ?call, "after a failed create");
    }
}

fn delete(call: &Call, within: Duration) -> Result<()> {
    // Not an error for a container that runc does not know.
    let forced = DeleteOpts::new().force(true);
    call.run("OCI runtime delete failed", None, within, |runc, id| runc.delete(id, Some(&forced)))
}
