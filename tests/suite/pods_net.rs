//! What guests of a pod do with its network themselves: sockets of WASI 0.2 and 0.3, and names, looked up as the pod's own
//! resolv.conf and hosts file say, at a real name server (dnsmasq) on the node.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use k8s_cri::v1::{DnsConfig, Mount, PodSandboxConfig, PortMapping};

use super::pods::{addr, expect_empty, get};
use crate::common::containerd::Containerd;
use crate::common::cri::{Kubelet, Pod, variable};
use crate::common::job::Job;
use crate::common::node::SUBNET;
use crate::common::site::PREFIX;
use crate::common::{Outcome, SOON, wait};

pub const CASES: crate::common::Cases = &[
    ("sockets_of_a_guest_are_in_its_pod", sockets),
    ("a_guest_sees_nothing_of_the_nodes_network", nothing_of_the_node),
    ("a_setting_denies_sockets", denied),
    ("sockets_of_a_server_are_in_its_pod", servers),
    ("names_are_looked_up_as_the_pod_says", names),
    ("a_large_answer_comes_over_tcp", large_answer),
    ("a_dead_name_server_is_told_in_time", dead_server),
    ("a_port_of_the_node_leads_to_the_pod", host_port),
];

const PORT: u16 = 9000;

/// The net guest in a pod, to its end, which must have this code.
fn run(pod: &Pod<'_>, name: &str, words: &[&str], code: i32) -> Result<String> {
    // A name of its own: the log of another attempt would be appended to.
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let name = format!("{name}-{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let container = pod.guest(&name, words, |_| {})?;
    container.start()?;
    let output = container.expect(code);
    container.remove()?;
    output
}

fn sockets(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let (server, client) = (kubelet.run(kubelet.pod("server")?)?, kubelet.run(kubelet.pod("client")?)?);
    let to = addr(&server, PORT)?.to_string();
    for (verb, serve, guest) in [
        ("tcp", "tcp-serve", "/net.wasm"),
        ("udp", "udp-serve", "/net.wasm"),
        ("tcp", "tcp-serve", "/net3.wasm"),
        ("udp", "udp-serve", "/net3.wasm"),
    ] {
        let name = format!("{verb}{}", guest.contains('3'));
        let serving = server.guest(&name, &["/net.wasm", serve, &format!("0.0.0.0:{PORT}")], |_| {})?;
        serving.start()?;
        serving.wait_log("listening")?;
        ensure!(run(&client, &name, &[guest, verb, &to, "there and back"], 0)? == "there and back\n", "{guest} {verb}");
        serving.expect(0)?;
        serving.remove()?;
    }
    // In one pod, over its loopback.
    let serving = server.guest("own", &["/net.wasm", "tcp-serve", &format!("127.0.0.1:{PORT}")], |_| {})?;
    serving.start()?;
    serving.wait_log("listening")?;
    let own = format!("127.0.0.1:{PORT}");
    ensure!(run(&client, "other", &["/net.wasm", "tcp", &own, "x"], 1)?.contains("error: connection-refused"));
    ensure!(run(&server, "same", &["/net.wasm", "tcp", &own, "x"], 0)? == "x\n");
    serving.expect(0)?;
    server.remove()?;
    client.remove()?;
    expect_empty(&kubelet)
}

/// Neither with its sockets nor with its requests: what listens on the node's loopback, it cannot reach.
fn nothing_of_the_node(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let pod = kubelet.run(kubelet.pod("curious")?)?;
    pod.web("web", &[])?;
    let listener = kubelet.node()?.inside(|| Ok(TcpListener::bind("127.0.0.1:0")?))?;
    let secret = listener.local_addr()?.to_string();
    for (name, guest) in [("two", "/net.wasm"), ("three", "/net3.wasm")] {
        let refused = run(&pod, name, &[guest, "tcp", &secret, "x"], 1)?;
        ensure!(refused.to_lowercase().replace('-', "").contains("connectionrefused"), "{guest}: {refused}");
    }
    let refused = get(&kubelet, addr(&pod, 8080)?, &format!("/fetch?url=http://{secret}/"))?;
    ensure!(refused.header("x-error") == Some("ConnectionRefused"), "{refused:?}");
    pod.remove()?;
    expect_empty(&kubelet)
}

fn denied(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let pod = kubelet.run(kubelet.pod("quiet")?)?;
    let at = format!("127.0.0.1:{PORT}");
    for (name, words, error) in [
        ("tcp", ["/net.wasm", "tcp-serve", &at].as_slice(), "access-denied"),
        ("udp", &["/net.wasm", "udp-serve", &at], "access-denied"),
        ("lookup", &["/net.wasm", "lookup", "localhost"], "access-denied"),
        ("tcp3", &["/net3.wasm", "tcp", &at, "x"], "AccessDenied"),
        ("lookup3", &["/net3.wasm", "lookup", "localhost"], "AccessDenied"),
    ] {
        let container = pod.guest(name, words, |config| {
            config.annotations.insert("troupe.dev/sockets".into(), "deny".into());
        })?;
        container.start()?;
        let said = container.expect(1)?;
        ensure!(said.starts_with("error: ") && said.contains(error), "{words:?}: {said}");
    }
    let mistyped = pod.guest("typo", &["/net.wasm", "lookup", "localhost"], |config| {
        config.annotations.insert("troupe.dev/sockets".into(), "no".into());
    })?;
    let error = mistyped.start().err().context("a wrong annotation was accepted")?;
    ensure!(format!("{error:#}").contains("is not a policy for sockets; choose one of allow, deny"), "{error:#}");
    pod.remove()?;
    expect_empty(&kubelet)
}

/// Those of servers are linked apart from those of commands.
fn servers(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let other = kubelet.run(kubelet.pod("other")?)?;
    other.web("web", &[])?;
    let listener = kubelet.node()?.inside(|| Ok(TcpListener::bind("127.0.0.1:0")?))?;
    let secret = listener.local_addr()?;
    kubelet.node()?.inside(|| TcpStream::connect(secret).map(drop).context("the node itself"))?;
    for (guest, refused, denied) in
        [("/connect.wasm", "connection-refused", "access-denied"), ("/web3.wasm", "ConnectionRefused", "AccessDenied")]
    {
        let pod = kubelet.run(kubelet.pod("serving")?)?;
        pod.guest("free", &[guest], |_| {})?.start()?;
        let quiet = pod.guest("quiet", &[guest], |config| {
            config.envs = vec![variable(&format!("{PREFIX}SOCKET_ADDR"), "0.0.0.0:8081")];
            config.annotations.insert("troupe.dev/sockets".into(), "deny".into());
        })?;
        quiet.start()?;
        let (free, quiet) = (addr(&pod, 8080)?, addr(&pod, 8081)?);
        let connect = |from, to: SocketAddr| get(&kubelet, from, &format!("/connect?addr={to}")).context(guest);
        let own = SocketAddr::from(([127, 0, 0, 1], 8080));
        for to in [addr(&other, 8080)?, own] {
            connect(free, to)?.expect(200, "connected\n").context(guest)?;
        }
        for (from, to, error) in [(free, secret, refused), (quiet, own, denied)] {
            connect(from, to)?.expect(200, error).context(guest)?;
        }
        get(&kubelet, quiet, "/hello")?.expect(200, "hello\n")?;
        pod.remove()?;
    }
    other.remove()?;
    expect_empty(&kubelet)
}

/// dnsmasq on the node's address in the pods' network. It knows what its records say, and nothing else.
fn name_server(kubelet: &Kubelet<'_>, records: &str) -> Result<Job> {
    let folder = kubelet.containerd.folder();
    let hosts = folder.join("records");
    fs::write(&hosts, records)?;
    let mut command = kubelet.node()?.command("dnsmasq");
    command
        .args(["--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--bind-interfaces"])
        .args(["--user=root", "--local=/./", "--log-facility=-", "--pid-file="])
        .arg(format!("--listen-address={SUBNET}.1"))
        .arg(format!("--addn-hosts={}", hosts.display()));
    let job = Job::spawn(command)?;
    let at = (format!("{SUBNET}.1").parse::<Ipv4Addr>()?, 53);
    wait::until_true("dnsmasq to listen", SOON, || kubelet.node()?.inside(|| Ok(TcpStream::connect(at).is_ok())))?;
    Ok(job)
}

fn with_dns(kubelet: &Kubelet<'_>, name: &str, server: &str, options: &[&str]) -> Result<PodSandboxConfig> {
    let mut config = kubelet.pod(name)?;
    config.dns_config = Some(DnsConfig {
        servers: vec![server.to_owned()],
        searches: vec!["shop.svc.cluster.local".into(), "svc.cluster.local".into()],
        options: options.iter().map(|&option| option.to_owned()).collect(),
    });
    Ok(config)
}

fn names(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    // The bridge comes with the first pod.
    let first = kubelet.run(kubelet.pod("first")?)?;
    let _server = name_server(
        &kubelet,
        "10.9.0.1 db.shop.svc.cluster.local\n10.9.0.2 cache.bank.svc.cluster.local\n10.9.0.3 example.test\n",
    )?;
    let server = format!("{SUBNET}.1");
    let pod = kubelet.run(with_dns(&kubelet, "asking", &server, &["ndots:5"])?)?;
    for guest in ["/net.wasm", "/net3.wasm"] {
        for (name, found) in [
            ("db", "10.9.0.1"),
            ("cache.bank", "10.9.0.2"),
            ("example.test", "10.9.0.3"),
            ("example.test.", "10.9.0.3"),
            ("10.1.2.3", "10.1.2.3"),
            ("localhost", "127.0.0.1"),
        ] {
            let said = run(&pod, "lookup", &[guest, "lookup", name], 0)?;
            ensure!(said.lines().next() == Some(found), "{guest} {name}: {said}");
        }
        let said = run(&pod, "lookup", &[guest, "lookup", "nobody"], 1)?;
        ensure!(said.to_lowercase().replace('-', "").contains("nameunresolvable"), "{guest}: {said}");
    }
    // A server's requests ask the same ones, and the hosts file that a kubelet mounts comes first.
    let web = addr(&pod, 8080)?;
    let hosts = kubelet.containerd.folder().join("etc-hosts");
    fs::write(&hosts, format!("127.0.0.1 localhost\n{} me.example db\n", web.ip()))?;
    let serving = pod.guest("web", &[crate::common::site::WEB], |config| {
        config.mounts = vec![Mount {
            container_path: "/etc/hosts".into(),
            host_path: hosts.display().to_string(),
            ..Default::default()
        }];
    })?;
    serving.start()?;
    for name in ["me.example", "db"] {
        get(&kubelet, web, &format!("/fetch?url=http://{name}:8080/hello"))?.expect(200, "hello\n")?;
    }
    let unknown = get(&kubelet, web, "/fetch?url=http://nobody.example/")?;
    ensure!(unknown.header("x-error").is_some_and(|error| error.contains("DnsError")), "{unknown:?}");
    pod.remove()?;
    first.remove()?;
    expect_empty(&kubelet)
}

/// More addresses than a datagram holds.
fn large_answer(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let first = kubelet.run(kubelet.pod("first")?)?;
    let records = (1..=200).map(|number| format!("10.8.0.{number} many.test\n")).collect::<String>();
    let _server = name_server(&kubelet, &records)?;
    let pod = kubelet.run(with_dns(&kubelet, "large", &format!("{SUBNET}.1"), &["ndots:1"])?)?;
    let said = run(&pod, "lookup", &["/net.wasm", "lookup", "many.test"], 0)?;
    // So many are told, of all that came.
    ensure!(said.lines().count() == 16 && said.lines().all(|line| line.starts_with("10.8.0.")), "{said}");
    pod.remove()?;
    first.remove()?;
    expect_empty(&kubelet)
}

/// It takes questions and never answers.
fn dead_server(containerd: &Containerd) -> Outcome {
    let kubelet = Kubelet::connect(containerd)?;
    let first = kubelet.run(kubelet.pod("first")?)?;
    let at = SocketAddr::new(IpAddr::V4(format!("{SUBNET}.1").parse()?), 53);
    let silent = kubelet.node()?.inside(|| Ok(UdpSocket::bind(at)?))?;
    let pod = kubelet.run(with_dns(&kubelet, "patient", &format!("{SUBNET}.1"), &["timeout:1", "attempts:1"])?)?;
    let said = run(&pod, "lookup", &["/net.wasm", "lookup", "db."], 1)?;
    ensure!(said.contains("error: temporary-resolver-failure"), "{said}");
    drop(silent);
    // And one that nobody has: the node says so.
    let said = run(&pod, "lookup", &["/net.wasm", "lookup", "db."], 1)?;
    ensure!(said.contains("resolver-failure"), "{said}");
    pod.remove()?;
    first.remove()?;
    expect_empty(&kubelet)
}

/// What a kubelet asks for with `hostPort`: CNI's portmap, in the node's own iptables.
fn host_port(containerd: &Containerd) -> Outcome {
    const HOST_PORT: u16 = 18080;
    let kubelet = Kubelet::connect(containerd)?;
    let mut config = kubelet.pod("mapped")?;
    config.port_mappings =
        vec![PortMapping { container_port: 8080, host_port: HOST_PORT.into(), ..Default::default() }];
    let pod = kubelet.run(config)?;
    pod.web("web", &[])?;
    let node = SocketAddr::new(IpAddr::V4(format!("{SUBNET}.1").parse()?), HOST_PORT);
    get(&kubelet, node, "/hello")?.expect(200, "hello\n")?;
    pod.remove()?;
    ensure!(get(&kubelet, node, "/hello").is_err(), "the port is still mapped");
    expect_empty(&kubelet)
}
