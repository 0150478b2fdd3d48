//! runc's own runtime options, as far as they act on native containers.
//!
//! They come in the table of a RuntimeClass, under the names that runc's shim has for them, or as runc's message with a
//! single create (`ctr run --runc-binary`, nerdctl); the message wins. Called by `options` and by the task service.

use anyhow::{Context, Result, bail};
use containerd_shim_protos::protobuf::Message as _;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci;
use toml::Value;
use troupe_actors::RuncOptions;

/// Compared without case, as containerd does.
const KEYS: [&str; 5] = ["BinaryName", "Root", "SystemdCgroup", "NoPivotRoot", "NoNewKeyring"];

/// Whether it is a key of the table that belongs here.
pub fn is_key(key: &str) -> bool {
    KEYS.iter().any(|known| known.eq_ignore_ascii_case(key))
}

/// Sets one key of the table. Empty texts say nothing, as containerd writes them.
///
/// # Errors
/// For a value of another type, or a path that is not absolute.
pub fn set(options: &mut RuncOptions, key: &str, value: &Value) -> Result<()> {
    let text = || value.as_str().map(str::to_owned).context("must be a string");
    let flag = || value.as_bool().context("must be true or false");
    match key.to_ascii_lowercase().as_str() {
        "binaryname" => options.binary = Some(text()?).filter(|name| !name.is_empty()),
        "root" => {
            let root = text()?;
            if !root.is_empty() && !root.starts_with('/') {
                bail!("{root} is not an absolute path");
            }
            options.root = Some(root).filter(|root| !root.is_empty()).map(Into::into);
        }
        "systemdcgroup" => options.systemd_cgroup = flag()?,
        "nopivotroot" => options.no_pivot_root = flag()?,
        "nonewkeyring" => options.no_new_keyring = flag()?,
        _ => {}
    }
    Ok(())
}

/// What a create says; `None` when its message is another, or says nothing. Many clients send runc's, whatever the runtime.
pub fn of_request(message: Option<&Any>) -> Option<RuncOptions> {
    let message = message.filter(|any| any.type_url.rsplit('/').next() == Some("containerd.runc.v1.Options"))?;
    let sent = oci::Options::parse_from_bytes(&message.value).ok()?;
    let options = RuncOptions {
        binary: Some(sent.binary_name).filter(|name| !name.is_empty()),
        root: Some(sent.root).filter(|root| root.starts_with('/')).map(Into::into),
        systemd_cgroup: sent.systemd_cgroup,
        no_pivot_root: sent.no_pivot_root,
        no_new_keyring: sent.no_new_keyring,
    };
    (options != RuncOptions::default()).then_some(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read_in_any_case() {
        let mut options = RuncOptions::default();
        for (key, value) in
            [("binaryName", Value::from("crun")), ("Root", Value::from("/run/x")), ("SYSTEMDCGROUP", Value::from(true))]
        {
            assert!(is_key(key));
            set(&mut options, key, &value).unwrap();
        }
        assert_eq!((options.binary.as_deref(), options.systemd_cgroup), (Some("crun"), true));
        set(&mut options, "BinaryName", &Value::from("")).unwrap();
        set(&mut options, "Root", &Value::from("")).unwrap();
        assert_eq!((options.binary, options.root), (None, None));
        let mut options = RuncOptions::default();
        assert!(set(&mut options, "Root", &Value::from("run")).is_err());
        assert!(set(&mut options, "SystemdCgroup", &Value::from("yes")).is_err());
        assert!(!is_key("ShimCgroup"));
    }

    #[test]
    fn a_message_of_runcs_is_read_and_others_are_not() {
        let sent = oci::Options { binary_name: "crun".into(), systemd_cgroup: true, ..Default::default() };
        let any = |url: &str, message: &oci::Options| Any {
            type_url: url.into(),
            value: message.write_to_bytes().unwrap(),
            ..Default::default()
        };
        let read = of_request(Some(&any("containerd.runc.v1.Options", &sent))).unwrap();
        assert_eq!((read.binary.as_deref(), read.systemd_cgroup), (Some("crun"), true));
        assert_eq!(of_request(Some(&any("runtimeoptions.v1.Options", &sent))), None);
        assert_eq!(of_request(Some(&any("containerd.runc.v1.Options", &oci::Options::default()))), None);
        assert_eq!(of_request(None), None);
    }
}
