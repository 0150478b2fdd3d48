//! `-info` and `-v`: what this binary is. containerd 2.2 runs `-info` at every create, so it does nothing but answer.

use anyhow::{Context, Result};
use containerd_shim::protos::protobuf::Message as _;
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::types::introspection::{RuntimeInfo, RuntimeVersion};

use crate::group::GroupKind;

const RUNTIME_NAME: &str = "io.containerd.wasmtime.v1";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The commit, when the build knew it (`TROUPE_REVISION=$(git rev-parse HEAD) cargo build`).
const REVISION: &str = match option_env!("TROUPE_REVISION") {
    Some(revision) => revision,
    None => "unknown",
};

/// `input` is the `Any` of the runtime options, which the answer repeats.
pub fn info(input: &[u8]) -> Result<Vec<u8>> {
    let options = match input {
        [] => None,
        bytes => Some(Any::parse_from_bytes(bytes).context("stdin does not hold runtime options (a protobuf Any)")?),
    };
    let annotations = [("troupe.dev/groups", GroupKind::NAMES.join(",")), ("troupe.dev/guests", guests())];
    let info = RuntimeInfo {
        name: RUNTIME_NAME.to_owned(),
        version: Some(RuntimeVersion {
            version: VERSION.to_owned(),
            revision: REVISION.to_owned(),
            ..Default::default()
        })
        .into(),
        options: options.into(),
        annotations: annotations.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        ..Default::default()
    };
    Ok(info.write_to_bytes()?)
}

/// In the form of containerd's own shims.
pub fn version(program: &str) -> String {
    format!("{program}:\n  Version:  {VERSION}\n  Revision: {REVISION}\n\n")
}

fn guests() -> String {
    ["wasi-preview1-command", "wasi-0.2-command"].join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_repeats_the_options_and_names_the_groups() {
        let any = Any { type_url: "containerd.runc.v1.Options".into(), value: vec![1], ..Default::default() };
        let info = RuntimeInfo::parse_from_bytes(&info(&any.write_to_bytes().unwrap()).unwrap()).unwrap();
        assert_eq!((info.name.as_str(), info.version.version.as_str()), (RUNTIME_NAME, VERSION));
        assert_eq!(info.options.as_ref(), Some(&any));
        assert_eq!(info.annotations["troupe.dev/groups"], "pod,namespace,node");
    }

    #[test]
    fn no_options_are_fine_and_garbage_is_not() {
        assert!(RuntimeInfo::parse_from_bytes(&info(&[]).unwrap()).unwrap().options.is_none());
        assert!(info(&[0xff]).is_err());
    }

    #[test]
    fn the_version_has_the_form_of_other_shims() {
        let text = version("containerd-shim-wasmtime-v1");
        assert!(text.starts_with("containerd-shim-wasmtime-v1:\n  Version:  "), "{text}");
    }
}
