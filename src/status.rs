//! The one table from our refusals to codes of the task API (PROTOCOL: gRPC status codes over ttrpc).

use containerd_shim_protos::ttrpc::{self, Code};
use troupe_actors::Error;

/// The answer containerd gets. What only we can mend goes to our log as well.
pub fn to_ttrpc(error: Error) -> ttrpc::Error {
    let code = match &error {
        // containerd's client looks for NotFound to tell "gone already" from a failure.
        Error::NotFound(_) | Error::AlreadyFinished(_) => Code::NOT_FOUND,
        Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
        Error::WrongState { .. } => Code::FAILED_PRECONDITION,
        Error::Invalid(_) | Error::Program(_) => Code::INVALID_ARGUMENT,
        Error::Unsupported(_) => Code::UNIMPLEMENTED,
        Error::ShuttingDown => Code::UNAVAILABLE,
        Error::Host { .. } => Code::UNKNOWN,
        Error::Internal(_) => {
            tracing::error!(%error, "a call failed");
            Code::INTERNAL
        }
    };
    ttrpc::error::get_rpc_status(code, error)
}

/// A verb or a part of it that this version does not have.
pub fn unimplemented(sentence: &str) -> ttrpc::Error {
    ttrpc::error::get_rpc_status(Code::UNIMPLEMENTED, sentence)
}

#[cfg(test)]
mod tests {
    use troupe_actors::ContainerId;

    use super::*;

    #[test]
    fn the_codes_that_containerd_acts_upon() {
        let id = ContainerId::new("default", "c");
        for (error, code, words) in [
            (Error::NotFound(id.clone()), Code::NOT_FOUND, "not found"),
            (Error::AlreadyFinished(id.clone()), Code::NOT_FOUND, "process already finished"),
            (Error::AlreadyExists(id.clone()), Code::ALREADY_EXISTS, "already exists"),
            (Error::WrongState { id, verb: "start", state: "running" }, Code::FAILED_PRECONDITION, "cannot start"),
            (Error::Unsupported("no".into()), Code::UNIMPLEMENTED, "no"),
            (Error::Program("/a: ELF".into()), Code::INVALID_ARGUMENT, "ELF"),
        ] {
            let ttrpc::Error::RpcStatus(status) = to_ttrpc(error) else { panic!("not a status") };
            assert_eq!(status.code(), code);
            assert!(status.message().contains(words), "{}", status.message());
        }
    }
}
