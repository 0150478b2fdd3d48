//! Tests of the runtime options; beside the code, in a file of their own for its length.

use containerd_shim::protos::protobuf::CodedOutputStream;

use super::*;

fn any(type_url: &str, path: &str, body: &str) -> Any {
    let mut value = Vec::new();
    let mut out = CodedOutputStream::vec(&mut value);
    out.write_string(1, "").unwrap();
    out.write_string(2, path).unwrap();
    out.write_string(3, body).unwrap();
    out.flush().unwrap();
    drop(out);
    Any { type_url: type_url.into(), value, ..Default::default() }
}

fn parse(body: &str) -> Result<Options> {
    Options::from_extensions(&[any("runtimeoptions.v1.Options", "", body)])
}

fn error(body: &str) -> String {
    let text = format!("{:#}", parse(body).unwrap_err());
    assert!(!text.contains('\n'), "{text}");
    text
}

#[test]
fn nothing_set_means_the_defaults() {
    assert_eq!(Options::from_extensions(&[]).unwrap(), Options::default());
    assert_eq!(parse("").unwrap(), Options::default());
}

#[test]
fn the_defaults_are_those_of_the_readme() {
    let code = |cell: &str| Some(cell.trim().strip_prefix('`')?.strip_suffix('`')?.to_owned());
    let (_, rest) = include_str!("../README.md").split_once("| key | unit | default | |").unwrap();
    let rows = rest.lines().skip(2).take_while(|line| line.starts_with('|'));
    let told = rows.filter_map(|row| {
        let cells: Vec<&str> = row.split('|').collect();
        Some((code(cells[1])?, code(cells[3])?)).filter(|(key, default)| !format!("{key}{default}").contains('`'))
    });
    let told: Vec<_> = told.collect();
    for (key, default) in &told {
        assert_eq!(parse(&format!("{key} = \"{default}\"")).unwrap(), Options::default(), "{key} = {default}");
    }
    assert_eq!(told.len(), 9, "{told:?}");
}

#[test]
fn every_key_is_understood() {
    let options = parse(
        "group = \"pod\"\ncache_dir = \"/x\"\ncache_max_size = \"10GiB\"\nidle_timeout = \"1m\"\ndrain_timeout = \"3s\"\ncompile_timeout = \"90s\"\n\
         compile_memory = \"1GiB\"\nmax_module_size = 1048576\nsockets = \"deny\"\nlog_level = \"debug\"\nhttp_request_timeout = \"5s\"\nhttp_backlog = 7",
    )
    .unwrap();
    let expected = Options {
        group: GroupKind::Pod,
        cache_dir: "/x".into(),
        cache_max_size: 10 << 30,
        idle_timeout: Duration::from_secs(60),
        drain_timeout: Duration::from_secs(3),
        compile_timeout: Duration::from_secs(90),
        compile_memory: 1 << 30,
        max_module_size: 1 << 20,
        sockets: SocketPolicy::Deny,
        http: BTreeMap::from([
            ("http_request_timeout".to_owned(), "5s".to_owned()),
            ("http_backlog".to_owned(), "7".to_owned()),
        ]),
        runc: RuncOptions::default(),
        log_level: Some(LogLevel::Debug),
    };
    assert_eq!(options, expected);
}

#[test]
fn keys_of_runc_act_on_native_containers_and_those_of_cri_are_ignored() {
    let body = "SystemdCgroup = true\nBinaryName = \"crun\"\nRoot = \"\"\nIoUid = 0\nTypeUrl = \"\"\nconfigpath = \"\"";
    let runc = RuncOptions { binary: Some("crun".into()), systemd_cgroup: true, ..RuncOptions::default() };
    assert_eq!(parse(body).unwrap(), Options { runc, ..Options::default() });
}

#[test]
fn all_mistakes_are_told_at_once() {
    let text = error("idle_timeout = 5\ngroup = \"cluster\"\ncolour = \"red\"\ncompile_memory = \"lots\"");
    for part in
        ["4 wrong", "`idle_timeout`", "\"5s\"", "`group`", "cluster", "`colour` is unknown", "cache_dir", "lots"]
    {
        assert!(text.contains(part), "{part} is missing in: {text}");
    }
}

#[test]
fn values_out_of_range_name_the_range() {
    assert!(error("idle_timeout = \"1ms\"").contains("100ms to 86400s"));
    assert!(error("compile_memory = 5").contains("out of range"));
    assert!(error("cache_max_size = \"1KiB\"").contains("out of range"));
    assert!(error("max_module_size = -5").contains("negative"));
    assert!(error("cache_dir = \"here\"").contains("absolute"));
    assert!(error("log_level = \"loud\"").contains("one of error"));
}

#[test]
fn a_broken_body_or_message_is_an_error_in_one_line() {
    assert!(error("group = ").contains("not valid TOML"));
    let broken = Any { type_url: "runtimeoptions.v1.Options".into(), value: vec![0x12, 0x7f], ..Default::default() };
    assert!(Options::from_extensions(&[broken]).is_err());
}

#[test]
fn other_messages_are_ignored_and_other_names_of_ours_are_not() {
    let junk = Any { type_url: "containerd.runc.v1.Options".into(), value: vec![0xff], ..Default::default() };
    assert_eq!(Options::from_extensions(&[junk]).unwrap(), Options::default());
    for name in ["type.googleapis.com/runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"] {
        assert_eq!(Options::from_extensions(&[any(name, "", "group = \"node\"")]).unwrap().group, GroupKind::Node);
    }
}

#[test]
fn a_config_path_is_read_and_the_body_wins_over_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("troupe.toml");
    fs::write(&path, "group = \"pod\"\nidle_timeout = \"7s\"").unwrap();
    let both = any("runtimeoptions.v1.Options", path.to_str().unwrap(), "group = \"node\"");
    let options = Options::from_extensions(&[both]).unwrap();
    assert_eq!((options.group, options.idle_timeout), (GroupKind::Node, Duration::from_secs(7)));
}

#[test]
fn a_config_path_that_cannot_be_read_is_named() {
    for path in ["/nowhere/troupe.toml", "relative.toml", "/dev/null", "/"] {
        let message = any("runtimeoptions.v1.Options", path, "");
        let text = format!("{:#}", Options::from_extensions(&[message]).unwrap_err());
        assert!(text.contains(path), "{text}");
    }
}
