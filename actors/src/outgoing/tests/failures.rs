//! Servers that do not answer, or answer badly; and requests that are none.

use std::time::Instant;

use http::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::server::{Server, answer, full, http, raw};
use super::*;

/// Reads the head of a request, then says `reply`, then closes if `close`.
async fn saying(reply: impl Into<Bytes>, close: bool) -> Server {
    let reply = reply.into();
    raw(move |mut stream| {
        let reply = reply.clone();
        async move {
            head(&mut stream).await;
            stream.write_all(&reply).await.ok();
            if !close {
                stream.read_to_end(&mut Vec::new()).await.ok();
            }
        }
    })
    .await
}

async fn head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

#[tokio::test]
async fn a_port_where_nobody_listens_refuses() {
    let addr = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_eq!(failure(send(&client(), get(url(addr))).await), Failure::Refused);
}

#[tokio::test]
async fn a_server_that_does_not_accept_is_given_up() {
    let (addr, _full) = full("127.0.0.1:0").await;
    let start = Instant::now();
    let request = send_in(&client(), get(url(addr)), short(200, 60_000, 60_000)).await;
    assert_eq!(failure(request), Failure::ConnectTimeout);
    assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_given_up() {
    let mut server = http(|_| std::future::pending()).await;
    let client = client();
    let start = Instant::now();
    let request = send_in(&client, get(url(server.addr)), short(60_000, 200, 60_000)).await;
    assert_eq!(failure(request), Failure::ReadTimeout);
    assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
    // The connection is not kept: an answer may still come on it.
    server.until(|counts| counts.open == 0).await;
}

#[tokio::test]
async fn a_response_that_pauses_too_long_is_given_up() {
    let server = saying("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nfirst", false).await;
    let client = client();
    let exchange = send_in(&client, get(url(server.addr)), short(60_000, 60_000, 200)).await.unwrap();
    let mut body = exchange.response.into_body();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "first");
    let start = Instant::now();
    assert_eq!(timeout(PATIENCE, body.frame()).await.unwrap().unwrap().unwrap_err(), Failure::ReadTimeout);
    assert!(start.elapsed() >= Duration::from_millis(150), "{:?}", start.elapsed());
    assert!(body.frame().await.is_none());
}

#[tokio::test]
async fn a_slow_response_is_no_silent_one() {
    let server = raw(|mut stream| async move {
        head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n").await.unwrap();
        for _ in 0..8 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            stream.write_all(b".").await.unwrap();
        }
    })
    .await;
    let client = client();
    let exchange = send_in(&client, get(url(server.addr)), short(60_000, 60_000, 600)).await.unwrap();
    assert_eq!(text(exchange).await.unwrap(), "........");
}

#[tokio::test]
async fn a_bad_answer_is_named() {
    let long = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "x".repeat(70_000));
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "x: y\r\n".repeat(200));
    for (reply, expected) in [
        (String::new(), Failure::Terminated),
        ("HTTP/1.1 200 OK\r\nx: ".into(), Failure::Terminated),
        (long, Failure::HeadTooLarge(MAX_HEAD)),
        (many, Failure::HeadTooLarge(MAX_HEAD)),
        ("HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n".into(), Failure::Upgraded),
    ] {
        let server = saying(reply, true).await;
        assert_eq!(failure(send(&client(), get(url(server.addr))).await), expected);
    }
    let server = saying("SSH-2.0-OpenSSH\r\n", false).await;
    let refused = failure(send(&client(), get(url(server.addr))).await);
    assert!(matches!(refused, Failure::Protocol(_)), "{refused:?}");
}

#[tokio::test]
async fn a_cut_response_does_not_end_cleanly() {
    for (reply, expected) in [
        ("content-length: 10\r\n\r\nfirst", Some(Failure::Incomplete)),
        ("transfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n", Some(Failure::Incomplete)),
        ("transfer-encoding: chunked\r\n\r\n5\r\nfirst\r\nnonsense\r\n", None),
    ] {
        let server = saying(format!("HTTP/1.1 200 OK\r\n{reply}"), true).await;
        let client = client();
        let failure = text(send(&client, get(url(server.addr))).await.unwrap()).await.unwrap_err();
        match expected {
            Some(expected) => assert_eq!(failure, expected, "{reply}"),
            None => assert!(matches!(&failure, Failure::Protocol(_)), "{reply}: {failure:?}"),
        }
    }
}

#[tokio::test]
async fn a_body_in_flight_does_not_end_cleanly_with_the_client() {
    for reply in ["content-length: 10\r\n\r\nfirst", "transfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n"] {
        let mut server = saying(format!("HTTP/1.1 200 OK\r\n{reply}"), false).await;
        let client = client();
        let exchange = send(&client, get(url(server.addr))).await.unwrap();
        drop(client);
        assert_eq!(text(exchange).await.unwrap_err(), Failure::Incomplete, "{reply}");
        server.until(|counts| counts.open == 0).await;
    }
}

#[tokio::test]
async fn what_is_no_request_is_not_sent() {
    let client = client();
    for uri in ["/path", "ftp://a.test/", "http://user:secret@a.test/", "http://a.test:99999/", "http://[::1]:x/"] {
        let Ok(uri) = uri.parse::<Uri>() else { continue };
        assert_eq!(failure(send(&client, get(uri.clone())).await), Failure::InvalidUri, "{uri}");
    }
    let mut connect = get("http://a.test/");
    *connect.method_mut() = Method::CONNECT;
    assert_eq!(failure(send(&client, connect).await), Failure::InvalidMethod);
}

#[tokio::test]
async fn a_request_goes_out_as_the_guest_wrote_it() {
    let server = raw(|mut stream| async move {
        let head = head(&mut stream).await;
        stream.write_all(format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{head}").as_bytes()).await.unwrap();
    })
    .await;
    let client = client();
    let mut request = get(format!("http://{}/a%2F/../b?x=//y&z=%20", server.addr));
    request.headers_mut().insert("host", "Guest.Example:81".parse().unwrap());
    request.headers_mut().insert("x-own", "value".parse().unwrap());
    let seen = text(send(&client, request).await.unwrap()).await.unwrap();
    assert_eq!(seen, "GET /a%2F/../b?x=//y&z=%20 HTTP/1.1\r\nhost: Guest.Example:81\r\nx-own: value\r\n\r\n");

    let seen = text(send(&client, get(format!("http://{}?only=query", server.addr))).await.unwrap()).await.unwrap();
    assert_eq!(seen, format!("GET /?only=query HTTP/1.1\r\nhost: {}\r\n\r\n", server.addr));
}

#[tokio::test]
async fn a_redirect_is_the_guests_business() {
    let server = http(|_| async {
        let mut answer = answer("elsewhere");
        *answer.status_mut() = StatusCode::FOUND;
        answer.headers_mut().insert("location", "/elsewhere".parse().unwrap());
        answer
    })
    .await;
    let client = client();
    let exchange = send(&client, get(url(server.addr))).await.unwrap();
    assert_eq!(exchange.response.status(), StatusCode::FOUND);
    assert_eq!(text(exchange).await.unwrap(), "elsewhere");
}
