//! What containerd tells `start`, and how it wants to be answered. Three protocols, told apart here and nowhere else:
//!
//! | containerd | request | reply |
//! |---|---|---|
//! | 1.6 | flags, environment, `Any` on stdin | the plain address |
//! | 1.7 – 2.2 | the same and `MAX_SHIM_VERSION` | JSON |
//! | 2.3 | `BootstrapParams` on stdin | `BootstrapResult` |
//!
//! `Any` and `BootstrapParams` look alike on the wire (both begin with two strings), so the first two fields are
//! compared with the flags `-id` and `-namespace`, which every version passes. The messages come from
//! `containerd-shim`; its own reader does not know 1.6 and 1.7 and is private. Called by `start`.

use std::env;
use std::io::{IsTerminal as _, Read as _};

use anyhow::{Context, Result, bail};
use containerd_shim::bootstrap::{BootstrapParams, BootstrapResult, Extension, LogLevel};
use containerd_shim::protos::protobuf::well_known_types::any::Any;
use containerd_shim::protos::protobuf::{EnumOrUnknown, Message as _};
use containerd_shim::{Flags, StartOpts};

const PROTOCOL: &str = "ttrpc";

/// containerd's own bound on what it sends.
const MAX_INPUT: u64 = 10 << 20;

/// The task API in the reply of the JSON days. With 2, containerd runs `start` for every container; 1.7 refuses 3.
const LEGACY_VERSION: u32 = 2;

/// The task API since 2.3. The daemon serves both under one address, so the reply is true for every living daemon.
const VERSION: i32 = 3;

/// How the caller wants to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    Plain,
    Json { version: u32 },
    Protobuf,
}

/// The environment of the protocols before 2.3, read once so that the rest is pure.
#[derive(Debug, Default)]
pub struct LegacyEnv {
    ttrpc_address: String,
    grpc_address: String,
    max_shim_version: Option<String>,
}

impl LegacyEnv {
    pub fn read() -> Self {
        let get = |name| env::var(name).ok().filter(|value: &String| !value.is_empty());
        Self {
            ttrpc_address: get("TTRPC_ADDRESS").unwrap_or_default(),
            grpc_address: get("GRPC_ADDRESS").unwrap_or_default(),
            max_shim_version: get("MAX_SHIM_VERSION"),
        }
    }
}

/// Reads what containerd piped in; nothing when somebody runs the verb by hand.
pub fn read_stdin() -> Result<Vec<u8>> {
    let stdin = std::io::stdin();
    let mut input = Vec::new();
    if !stdin.is_terminal() {
        stdin.lock().take(MAX_INPUT + 1).read_to_end(&mut input).context("cannot read stdin")?;
    }
    if input.len() as u64 > MAX_INPUT {
        bail!("stdin holds more than {MAX_INPUT} bytes");
    }
    Ok(input)
}

/// Recognises the protocol and brings all of them into one form.
pub fn parse(input: &[u8], flags: &Flags, env: LegacyEnv) -> Result<(StartOpts, Reply)> {
    for (flag, value) in [("-id", &flags.id), ("-namespace", &flags.namespace)] {
        if value.is_empty() {
            bail!("{flag} is missing: containerd passes it to every verb");
        }
    }
    let (mut params, reply) = match bootstrap_params(input, flags)? {
        Some(params) => (params, Reply::Protobuf),
        None => {
            let reply = legacy_reply(env.max_shim_version.as_deref())?;
            (legacy_params(input, flags, env)?, reply)
        }
    };
    if flags.debug && params.log_level.value() > LogLevel::LOG_LEVEL_DEBUG as i32 {
        params.log_level = EnumOrUnknown::new(LogLevel::LOG_LEVEL_DEBUG);
    }
    // Without it no exit would ever be reported; better now than in a daemon whose log nobody reads.
    if params.containerd_ttrpc_address.is_empty() {
        bail!("containerd's ttrpc address is missing (TTRPC_ADDRESS, or containerd_ttrpc_address in BootstrapParams)");
    }
    Ok((params.into(), reply))
}

impl Reply {
    pub fn encode(self, address: &str) -> Result<Vec<u8>> {
        Ok(match self {
            Self::Plain => address.as_bytes().to_vec(),
            Self::Json { version } => serde_json::to_vec(
                &serde_json::json!({ "version": version, "address": address, "protocol": PROTOCOL }),
            )?,
            Self::Protobuf => BootstrapResult {
                version: VERSION,
                address: address.to_owned(),
                protocol: PROTOCOL.to_owned(),
                ..Default::default()
            }
            .write_to_bytes()?,
        })
    }
}

fn bootstrap_params(input: &[u8], flags: &Flags) -> Result<Option<BootstrapParams>> {
    let Ok(params) = BootstrapParams::parse_from_bytes(input) else {
        return Ok(None);
    };
    if params.instance_id == flags.id && params.namespace == flags.namespace {
        return Ok(Some(params));
    }
    let two_strings = BootstrapParams {
        instance_id: params.instance_id.clone(),
        namespace: params.namespace.clone(),
        ..Default::default()
    };
    if params == two_strings {
        return Ok(None);
    }
    // More than an `Any` could hold, and for somebody else: answering would put a container into the wrong group.
    bail!("stdin describes {}/{}, the flags say {}/{}", params.namespace, params.instance_id, flags.namespace, flags.id)
}

fn legacy_params(input: &[u8], flags: &Flags, env: LegacyEnv) -> Result<BootstrapParams> {
    let any = Any::parse_from_bytes(input)
        .context("stdin holds neither runtime options (a protobuf Any) nor BootstrapParams")?;
    let extension = Extension { value: Some(any).into(), ..Default::default() };
    Ok(BootstrapParams {
        instance_id: flags.id.clone(),
        namespace: flags.namespace.clone(),
        containerd_ttrpc_address: env.ttrpc_address,
        containerd_grpc_address: if flags.address.is_empty() { env.grpc_address } else { flags.address.clone() },
        containerd_binary: flags.publish_binary.clone(),
        extensions: if input.is_empty() { Vec::new() } else { vec![extension] },
        ..Default::default()
    })
}

fn legacy_reply(max_shim_version: Option<&str>) -> Result<Reply> {
    let Some(text) = max_shim_version else {
        return Ok(Reply::Plain);
    };
    match text.parse::<u32>() {
        Ok(most) if most >= LEGACY_VERSION => Ok(Reply::Json { version: LEGACY_VERSION }),
        _ => bail!("MAX_SHIM_VERSION is {text:?}: this shim speaks version {LEGACY_VERSION} and later"),
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim::api::Options as RuncOptions;

    use super::*;

    fn flags() -> Flags {
        Flags { id: "abc".into(), namespace: "k8s.io".into(), address: "/run/c.sock".into(), ..Default::default() }
    }

    fn env(max: Option<&str>) -> LegacyEnv {
        LegacyEnv {
            ttrpc_address: "/run/c.sock.ttrpc".into(),
            grpc_address: "/run/env.sock".into(),
            max_shim_version: max.map(Into::into),
        }
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "abc".into(),
            namespace: "k8s.io".into(),
            containerd_ttrpc_address: "/run/c.sock.ttrpc".into(),
            containerd_grpc_address: "/run/c.sock".into(),
            socket_dir: Some("/run/x".into()),
            ..Default::default()
        }
    }

    #[test]
    fn the_three_protocols_are_told_apart() {
        assert_eq!(parse(&[], &flags(), env(None)).unwrap().1, Reply::Plain);
        assert_eq!(parse(&[], &flags(), env(Some("2"))).unwrap().1, Reply::Json { version: 2 });
        assert_eq!(parse(&[], &flags(), env(Some("3"))).unwrap().1, Reply::Json { version: 2 });
        let (opts, reply) = parse(&params().write_to_bytes().unwrap(), &flags(), LegacyEnv::default()).unwrap();
        assert_eq!((opts.socket_dir.as_deref(), reply), (Some("/run/x"), Reply::Protobuf));
    }

    #[test]
    fn an_any_is_not_taken_for_bootstrap_params() {
        for value in
            [Vec::new(), RuncOptions { binary_name: "crun".into(), ..Default::default() }.write_to_bytes().unwrap()]
        {
            let any = Any { type_url: "containerd.runc.v1.Options".into(), value, ..Default::default() };
            let (opts, reply) = parse(&any.write_to_bytes().unwrap(), &flags(), env(None)).unwrap();
            assert_eq!((opts.id.as_str(), opts.namespace.as_str(), reply), ("abc", "k8s.io", Reply::Plain));
            assert_eq!(opts.extensions, [any]);
        }
    }

    #[test]
    fn params_for_another_container_are_refused() {
        let other = BootstrapParams { instance_id: "other".into(), ..params() };
        let error = parse(&other.write_to_bytes().unwrap(), &flags(), env(None)).unwrap_err().to_string();
        assert!(error.contains("k8s.io/other") && error.contains("k8s.io/abc"), "{error}");
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let text = |result: Result<(StartOpts, Reply)>| format!("{:#}", result.unwrap_err());
        assert!(text(parse(&[], &flags(), LegacyEnv::default())).contains("TTRPC_ADDRESS"));
        assert!(text(parse(&[], &Flags { id: String::new(), ..flags() }, env(None))).contains("-id is missing"));
        assert!(text(parse(&[], &flags(), env(Some("1")))).contains("MAX_SHIM_VERSION"));
        assert!(text(parse(&[], &flags(), env(Some("two")))).contains("MAX_SHIM_VERSION"));
        assert!(text(parse(&[0xff, 0xfe, 1], &flags(), env(None))).contains("neither runtime options"));
    }

    #[test]
    fn the_flags_fill_what_the_environment_does_not() {
        let flag_first = parse(&[], &flags(), env(None)).unwrap().0;
        assert_eq!(flag_first.address, "/run/c.sock");
        let fallback = parse(&[], &Flags { address: String::new(), debug: true, ..flags() }, env(None)).unwrap().0;
        assert_eq!((fallback.address.as_str(), fallback.debug), ("/run/env.sock", true));
    }

    #[test]
    fn replies_have_the_shape_each_version_reads() {
        assert_eq!(Reply::Plain.encode("unix:///s").unwrap(), b"unix:///s");
        let json: serde_json::Value =
            serde_json::from_slice(&Reply::Json { version: 2 }.encode("unix:///s").unwrap()).unwrap();
        assert_eq!(json, serde_json::json!({"version": 2, "address": "unix:///s", "protocol": "ttrpc"}));
        let result = BootstrapResult::parse_from_bytes(&Reply::Protobuf.encode("unix:///s").unwrap()).unwrap();
        assert_eq!((result.version, result.address.as_str(), result.protocol.as_str()), (3, "unix:///s", "ttrpc"));
    }
}
