//! Requests that a guest sends: through the container's own client, to another container.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::common::containerd::Containerd;
use crate::common::ctr::Client;
use crate::common::http::{self, Answer, Connection, Protocol};
use crate::common::job::{self, Job};
use crate::common::site::{self, Site};
use crate::common::{Outcome, SOON, base, guests, wait};

pub const CASES: crate::common::Cases = &[
    ("a_guest_fetches_from_another_container", fetches),
    ("bodies_stream_through_a_guest", streams),
    ("what_cannot_be_reached_is_told_by_its_name", unreachable),
    ("a_policy_says_where_to", policy),
    ("https_is_sent_to_whom_the_image_trusts", encrypted),
];

/// For a certificate authority, and a server that it vouches for.
const TLS: &str = "[req]\ndistinguished_name = name\n[name]\n\
    [ca]\nbasicConstraints = critical, CA:TRUE\nkeyUsage = keyCertSign\n\
    [server]\nbasicConstraints = CA:FALSE\nsubjectAltName = DNS:localhost\n";

/// Of WASI 0.2 and 0.3, whose requests come to the client by other ways.
const GUESTS: [&str; 2] = [site::WEB, "/web3.wasm"];

fn server<'a>(client: &Client<'a>, guest: &str, settings: &[(&str, &str)]) -> Result<Site<'a>> {
    Site::start(site::with(client.guest(guest, &[])?, settings))
}

fn fetches(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("http");
    let back = site::web(&client, &[])?;
    for guest in GUESTS {
        let front = server(&client, guest, &[])?;
        http::block_on(async {
            for _ in 0..3 {
                fetch(&front, &format!("http://{}/hello", back.addr)).await?.expect(200, "hello\n")?;
            }
            let missing = fetch(&front, &format!("http://{}/nowhere", back.addr)).await?;
            ensure!(missing.status == 404 && missing.header("x-error").is_none(), "{missing:?}");
            Ok(())
        })
        .context(guest)?;
    }
    Ok(())
}

fn streams(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("http");
    let (front, back) = (site::web(&client, &[])?, site::web(&client, &[])?);
    http::block_on(async {
        let body = vec![b'x'; 1 << 20];
        let mut connection = Connection::open(front.addr, Protocol::One).await?;
        let answer = connection.post(&format!("/proxy?url=http://{}/echo", back.addr), body.clone()).await?;
        ensure!(answer.status == 200 && answer.body == body, "{} {} bytes", answer.status, answer.body.len());
        Ok(())
    })
}

fn unreachable(containerd: &Containerd) -> Outcome {
    let front = site::web(&containerd.namespace("http"), &[])?;
    // Nobody listens on a port that was free a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    http::block_on(async {
        error(&fetch(&front, &format!("http://{free}/")).await?, "ConnectionRefused")?;
        error(&fetch(&front, "http://no-such-name.invalid/").await?, "DnsError")?;
        // It speaks no TLS.
        error(&fetch(&front, &format!("https://{}/", front.addr)).await?, "Tls")
    })
}

fn policy(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("http");
    let back = site::web(&client, &[])?;
    let url = format!("http://{}/hello", back.addr);
    for guest in GUESTS {
        let allowing = |hosts: &str| server(&client, guest, &[("OUTGOING", hosts)]);
        let (none, other) = (allowing("none")?, allowing("a.example")?);
        let listed = allowing(&format!("a.example,{}", back.addr))?;
        http::block_on(async {
            error(&fetch(&none, &url).await?, "HttpRequestDenied")?;
            error(&fetch(&other, &url).await?, "HttpRequestDenied")?;
            fetch(&listed, &url).await?.expect(200, "hello\n")
        })
        .context(guest)?;
    }
    Ok(())
}

/// A server of openssl's, and images with and without its authority among their certificates.
fn encrypted(containerd: &Containerd) -> Outcome {
    let folder = base::folder(&format!("tls-{}", containerd.version))?;
    fs::write(folder.join("tls.cnf"), TLS)?;
    fs::write(folder.join("page.txt"), "over TLS\n")?;
    certificate(&folder, "ca", &[])?;
    certificate(&folder, "server", &["-CA", "ca.pem", "-CAkey", "ca.key"])?;
    let addr = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let mut server = openssl(&folder, &["s_server", "-WWW", "-cert", "server.pem", "-key", "server.key", "-accept"]);
    server.arg(addr.to_string());
    let _server = Job::spawn(server)?;
    wait::until_true("openssl to listen", SOON, || Ok(std::net::TcpStream::connect(addr).is_ok()))?;

    let root = folder.join("root");
    fs::create_dir_all(root.join("etc/ssl/certs"))?;
    fs::copy(guests::built("web.wasm")?, root.join("web.wasm"))?;
    fs::copy(folder.join("ca.pem"), root.join("etc/ssl/certs/ca-certificates.crt"))?;
    let client = containerd.namespace("http");
    let (trusts, other) = (Site::start(client.rootfs(&root, &[site::WEB]))?, site::web(&client, &[])?);
    let url = |host: &str| format!("https://{host}:{}/page.txt", addr.port());
    http::block_on(async {
        fetch(&trusts, &url("localhost")).await?.expect(200, "over TLS\n")?;
        // Not the name it vouches for, and an image that knows the public authorities only.
        error(&fetch(&trusts, &url("127.0.0.1")).await?, "TlsCertificateError")?;
        error(&fetch(&other, &url("localhost")).await?, "TlsCertificateError")
    })
}

fn certificate(folder: &Path, name: &str, signed_by: &[&str]) -> Outcome {
    let mut command = openssl(folder, &["req", "-x509", "-config", "tls.cnf", "-newkey", "ec", "-nodes", "-days", "1"]);
    command.args(["-pkeyopt", "ec_paramgen_curve:P-256", "-subj", &format!("/CN={name}"), "-extensions", name]);
    command.args(["-keyout", &format!("{name}.key"), "-out", &format!("{name}.pem")]).args(signed_by);
    job::run(command, SOON)?.success("openssl req").map(drop)
}

fn openssl(folder: &Path, words: &[&str]) -> Command {
    let mut command = Command::new("openssl");
    command.args(words).current_dir(folder);
    command
}

async fn fetch(from: &site::Site<'_>, url: &str) -> Result<Answer> {
    http::get(from.addr, Protocol::One, &format!("/fetch?url={url}")).await
}

/// The guest was told this error-code of `wasi:http`.
fn error(answer: &Answer, name: &str) -> Outcome {
    ensure!(answer.header("x-error").is_some_and(|error| error.starts_with(name)), "expected {name}: {answer:?}");
    Ok(())
}
