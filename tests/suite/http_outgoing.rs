//! Requests that a guest sends: through the container's own client, to another container.

use anyhow::{Result, ensure};

use crate::common::Outcome;
use crate::common::containerd::Containerd;
use crate::common::http::{self, Answer, Connection, Protocol};
use crate::common::site;

pub const CASES: crate::common::Cases = &[
    ("a_guest_fetches_from_another_container", fetches),
    ("bodies_stream_through_a_guest", streams),
    ("what_cannot_be_reached_is_told_by_its_name", unreachable),
    ("a_policy_says_where_to", policy),
];

fn fetches(containerd: &Containerd) -> Outcome {
    let client = containerd.namespace("http");
    let (front, back) = (site::web(&client, &[])?, site::web(&client, &[])?);
    http::block_on(async {
        for _ in 0..3 {
            fetch(&front, &format!("http://{}/hello", back.addr)).await?.expect(200, "hello\n")?;
        }
        let missing = fetch(&front, &format!("http://{}/nowhere", back.addr)).await?;
        ensure!(missing.status == 404 && missing.header("x-error").is_none(), "{missing:?}");
        Ok(())
    })
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
    let (none, other) =
        (site::web(&client, &[("OUTGOING", "none")])?, site::web(&client, &[("OUTGOING", "a.example")])?);
    let listed = site::web(&client, &[("OUTGOING", &format!("a.example,{}", back.addr))])?;
    http::block_on(async {
        error(&fetch(&none, &url).await?, "HttpRequestDenied")?;
        error(&fetch(&other, &url).await?, "HttpRequestDenied")?;
        fetch(&listed, &url).await?.expect(200, "hello\n")
    })
}

async fn fetch(from: &site::Site<'_>, url: &str) -> Result<Answer> {
    http::get(from.addr, Protocol::One, &format!("/fetch?url={url}")).await
}

/// The guest was told this error-code of `wasi:http`.
fn error(answer: &Answer, name: &str) -> Outcome {
    ensure!(answer.header("x-error").is_some_and(|error| error.starts_with(name)), "expected {name}: {answer:?}");
    Ok(())
}
