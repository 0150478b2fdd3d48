//! What a client sees of a served container: both protocols, both directions, and every kind of body.

use std::fs;
use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Frame;
use hyper::http::{HeaderMap, HeaderValue, Method};

use crate::common::containerd::Containerd;
use crate::common::http::{self, Answer, BOTH, Connection, Protocol};
use crate::common::site::{self, Site};
use crate::common::{Outcome, base};

pub const CASES: crate::common::Cases = &[
    ("hello_in_both_protocols", hello),
    ("curl_is_served", curl),
    ("a_connection_serves_many_requests", keep_alive),
    ("pipelined_requests_are_answered_in_order", pipelined),
    ("head_has_no_body", |containerd| serving(containerd, &[], heads)),
    ("a_small_answer_of_any_length_is_whole", small),
    ("an_upload_is_echoed_as_it_comes", echo),
    ("trailers_go_both_ways", trailers),
    ("a_client_that_expects_100_gets_it", expect_continue),
    ("an_upload_arrives_whole", upload),
    ("a_slow_reader_costs_no_memory", |containerd| serving(containerd, &[], leisure)),
    ("an_upload_that_nobody_reads_costs_no_memory", unread_upload),
    ("statuses_are_the_guests", statuses),
];

const MIB: usize = 1 << 20;

/// `web.wasm`, and an asynchronous use of it.
pub fn serving(
    containerd: &Containerd,
    settings: &[(&str, &str)],
    act: impl AsyncFnOnce(&Site<'_>) -> Outcome,
) -> Outcome {
    let site = site::web(&containerd.namespace("http"), settings)?;
    http::block_on(act(&site)).with_context(|| format!("the container's log: {:?}", site.log()))
}

fn hello(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        for protocol in BOTH {
            let answer = http::get(site.addr, protocol, "/hello").await?;
            answer.expect(200, "hello\n")?;
            ensure!(answer.header("content-type") == Some("text/plain"), "{answer:?}");
            ensure!(answer.header("content-length") == Some("6"), "{answer:?}");
            ensure!(answer.header("date").is_some(), "{answer:?}");
            http::get(site.addr, protocol, "/nowhere").await?.expect(404, "not found\n")?;
        }
        Ok(())
    })?;
    // The smallest there is: no allocator, no environment.
    let client = containerd.namespace("http");
    let small = Site::start(client.guest("/hello-http.wasm", &[])?)?;
    http::block_on(async {
        for protocol in BOTH {
            http::get(small.addr, protocol, "/").await?.expect(200, "hello world\n")?;
        }
        Ok(())
    })
}

fn curl(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        let url = format!("http://{}/hello", site.addr);
        for version in ["--http1.1", "--http2-prior-knowledge", "--http1.0"] {
            let shown = http::curl(&[version, "--write-out", "%{http_code} %{http_version}", &url])?.success("curl")?;
            let expected = match version {
                "--http2-prior-knowledge" => "hello\n200 2",
                _ => "hello\n200 1.1",
            };
            // An HTTP/1.0 request is answered as HTTP/1.0 or 1.1; either is right (RFC 9112, section 2.3).
            ensure!(shown == expected || shown == "hello\n200 1", "{version}: {shown}");
        }
        // An upgrade that the server does not make is answered in the old protocol.
        let shown = http::curl(&["--http2", "--write-out", "%{http_code}", &url])?.success("curl --http2")?;
        ensure!(shown == "hello\n200", "{shown}");
        Ok(())
    })
}

fn keep_alive(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        for protocol in BOTH {
            let mut connection = Connection::open(site.addr, protocol).await?;
            for number in 0..50 {
                match number % 3 {
                    0 => connection.get("/hello").await?.expect(200, "hello\n")?,
                    1 => connection.post("/echo", "once more").await?.expect(200, "once more")?,
                    // A body that the guest does not look at is in the way of the next request.
                    _ => connection.post("/hello", vec![b'x'; 1000]).await?.expect(200, "hello\n")?,
                }
            }
        }
        Ok(())
    })
}

fn pipelined(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        let mut requests = Vec::new();
        for code in 200..220 {
            write!(requests, "GET /status?code={code} HTTP/1.1\r\nHost: a\r\n\r\n")?;
        }
        requests.extend_from_slice(b"GET /hello HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        let (bytes, end) = http::exchange(site.addr, &requests, Duration::from_secs(10))?;
        let text = String::from_utf8_lossy(&bytes);
        let codes: Vec<&str> = text.split("HTTP/1.1 ").skip(1).filter_map(|part| part.get(..3)).collect();
        let expected: Vec<String> = (200..220).chain([200]).map(|code| code.to_string()).collect();
        ensure!(codes == expected && end == http::End::Closed, "{codes:?}, {end:?}");
        Ok(())
    })
}

/// Of WASI 0.3 as well (`http_concurrent.rs`).
pub async fn heads(site: &Site<'_>) -> Outcome {
    for protocol in BOTH {
        let mut connection = Connection::open(site.addr, protocol).await?;
        for (path, length) in
            [("/hello", Some("6")), ("/big?bytes=300000", None), ("/big?bytes=300000&length=1", Some("300000"))]
        {
            let request = connection.request(Method::HEAD, path, http::empty())?;
            let answer = connection.fetch(request).await.context(path)?;
            answer.expect(200, "")?;
            ensure!(answer.header("content-length") == length, "{path}: {answer:?}");
            connection.get("/hello").await?.expect(200, "hello\n")?;
        }
    }
    Ok(())
}

/// Up to some hundred bytes an answer is sent in another way than a larger one.
fn small(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        for (protocol, declared) in BOTH.into_iter().flat_map(|protocol| [(protocol, 0), (protocol, 1)]) {
            let mut connection = Connection::open(site.addr, protocol).await?;
            for bytes in 0..700 {
                let answer = connection.get(&format!("/big?bytes={bytes}&length={declared}")).await?;
                ensure!(answer.status == 200, "{bytes} bytes: {answer:?}");
                ensure!(answer.body == pattern(bytes), "{bytes} bytes in {protocol:?}: {:?}", answer.body);
            }
        }
        Ok(())
    })
}

/// Each piece is back before the next is sent: nothing waits for a whole body.
fn echo(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        for protocol in BOTH {
            let mut connection = Connection::open(site.addr, protocol).await?;
            let (feed, body) = http::fed();
            let request = connection.request(Method::POST, "/echo", body)?;
            let mut response = connection.send(request).await?;
            for number in 0..20 {
                let piece = Bytes::from(format!("piece {number} of many;").repeat(1 + number * 10));
                feed.send(Frame::data(piece.clone())).await?;
                let mut back = Vec::new();
                while back.len() < piece.len() {
                    let frame = http::soon("a piece", async { response.frame().await.context("the end") }).await??;
                    back.extend_from_slice(&frame.into_data().map_err(|frame| anyhow::anyhow!("{frame:?}"))?);
                }
                ensure!(back == piece, "{protocol:?}: piece {number} changed on its way");
            }
            drop(feed);
            Answer::of(response).await?.expect(200, "")?;
        }
        Ok(())
    })
}

fn trailers(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        for protocol in BOTH {
            let mut connection = Connection::open(site.addr, protocol).await?;
            let mut request = connection.request(Method::GET, "/trailers", http::empty())?;
            request.headers_mut().insert("te", HeaderValue::from_static("trailers"));
            let answer = connection.fetch(request).await?;
            answer.expect(200, "body\n")?;
            expect_trailer(&answer, "x-checksum", "abc")?;
            // And back: what the client sent after its body.
            let (feed, body) = http::fed();
            let mut request = connection.request(Method::POST, "/echo", body)?;
            request.headers_mut().insert("te", HeaderValue::from_static("trailers"));
            request.headers_mut().insert("trailer", HeaderValue::from_static("x-sum"));
            let sum = HeaderMap::from_iter([("x-sum".parse()?, HeaderValue::from_static("42"))]);
            let (answer, _) = tokio::try_join!(connection.fetch(request), async {
                feed.send(Frame::data("with trailers".into())).await?;
                feed.send(Frame::trailers(sum)).await?;
                drop(feed);
                Ok(())
            })?;
            answer.expect(200, "with trailers")?;
            expect_trailer(&answer, "x-sum", "42")?;
        }
        Ok(())
    })
}

fn expect_trailer(answer: &Answer, name: &str, value: &str) -> Result<()> {
    let trailer = answer.trailers.as_ref().and_then(|trailers| trailers.get(name));
    ensure!(trailer.is_some_and(|trailer| trailer == value), "no trailer {name}: {answer:?}");
    Ok(())
}

fn expect_continue(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        let file = base::folder("http")?.join("upload");
        fs::write(&file, vec![b'u'; MIB])?;
        let (url, data) = (format!("http://{}/count", site.addr), format!("@{}", file.display()));
        let done = http::curl(&["--verbose", "--header", "Expect: 100-continue", "--data-binary", &data, &url])?;
        ensure!(done.code == Some(0) && done.stderr.contains("HTTP/1.1 100 Continue"), "{done:?}");
        ensure!(done.text().starts_with("1048576 "), "{done:?}");
        // Who is refused need not send it.
        let head = "POST /hello HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n";
        let (answer, _) = http::exchange(site.addr, head.as_bytes(), Duration::from_millis(500))?;
        ensure!(answer.starts_with(b"HTTP/1.1 413 "), "{:?}", String::from_utf8_lossy(&answer));
        Ok(())
    })
}

/// What the guest should have counted.
pub fn counted(bytes: &[u8]) -> String {
    let hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{} {hash:016x}\n", bytes.len())
}

/// Byte `i` is `i % 251`, as the guest makes it.
pub fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index % 251) as u8).collect()
}

fn upload(containerd: &Containerd) -> Outcome {
    // As much as is allowed, and not a byte less.
    let whole = Bytes::from(pattern(16 * MIB));
    serving(containerd, &[("MAX_BODY", "16MiB")], async |site| {
        for protocol in BOTH {
            let mut connection = Connection::open(site.addr, protocol).await?;
            connection.post("/count", whole.clone()).await?.expect(200, &counted(&whole))?;
            let back = connection.post("/echo", whole.clone()).await?;
            ensure!(back.body == whole, "{protocol:?}: {} bytes came back", back.body.len());
        }
        Ok(())
    })
}

/// 64 MiB that a client takes at its leisure; of WASI 0.3 as well (`http_concurrent.rs`).
pub async fn leisure(site: &Site<'_>) -> Outcome {
    const LENGTH: usize = 64 * MIB;
    for protocol in BOTH {
        http::get(site.addr, protocol, "/big?bytes=1000000").await?;
        let before = site.memory_kib()?;
        let mut connection = Connection::open(site.addr, protocol).await?;
        let request = connection.request(Method::GET, &format!("/big?bytes={LENGTH}"), http::empty())?;
        let mut body = connection.send(request).await?.into_body();
        let (mut read, mut stalls) = (0, 0);
        while let Some(frame) = http::soon("more of the body", async { anyhow::Ok(body.frame().await) }).await? {
            let Ok(data) = frame?.into_data() else { continue };
            ensure!(data.iter().enumerate().all(|(at, byte)| *byte == ((read + at) % 251) as u8), "at {read}");
            read += data.len();
            if read > (stalls + 1) * LENGTH / 5 {
                stalls += 1;
                tokio::time::sleep(Duration::from_millis(150)).await;
                let growth = site.memory_kib()?.saturating_sub(before);
                ensure!(growth < 8 * 1024, "{protocol:?}: a reader that is slow costs {growth} KiB");
            }
        }
        ensure!(read == LENGTH, "{read} bytes");
    }
    Ok(())
}

/// The guest sleeps and looks at nothing; the client has much to say.
fn unread_upload(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        let whole = Bytes::from(vec![0; 48 * MIB]);
        for protocol in BOTH {
            http::get(site.addr, protocol, "/hello").await?;
            let before = site.memory_kib()?;
            let mut connection = Connection::open(site.addr, protocol).await?;
            let request = connection.request(Method::POST, "/sleep?ms=700", http::full(whole.clone()))?;
            let begun = Instant::now();
            let (answer, growth) = tokio::join!(connection.fetch(request), async {
                tokio::time::sleep(Duration::from_millis(500)).await;
                anyhow::Ok(site.memory_kib()?.saturating_sub(before))
            });
            ensure!(growth? < 8 * 1024, "{protocol:?}: what nobody reads is kept");
            // The answer may be followed by the end of the connection: nobody wants the rest.
            answer?.expect(200, "slept\n")?;
            ensure!(begun.elapsed() < Duration::from_secs(5), "it took {:?}", begun.elapsed());
            http::get(site.addr, protocol, "/hello").await?.expect(200, "hello\n")?;
        }
        Ok(())
    })
}

fn statuses(containerd: &Containerd) -> Outcome {
    serving(containerd, &[], async |site| {
        for protocol in BOTH {
            let mut connection = Connection::open(site.addr, protocol).await?;
            for code in [200, 201, 204, 205, 206, 299, 301, 304, 400, 401, 404, 418, 451, 500, 503, 599] {
                connection
                    .get(&format!("/status?code={code}"))
                    .await?
                    .expect(code, "")
                    .context(protocol_name(protocol))?;
            }
        }
        Ok(())
    })
}

fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::One => "HTTP/1.1",
        Protocol::Two => "HTTP/2",
    }
}
