//! Connections: kept, bounded, let go; and where they are made.

use std::sync::Arc;

use http::Method;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Barrier;

use super::server::{answer, connection, full, http, raw, serving};
use super::*;
use crate::bundle::{Namespace, Namespaces};
use crate::pod::Anchor;

#[tokio::test]
async fn a_connection_is_used_again() {
    let server = http(|_| async { answer("hello") }).await;
    let client = client();
    for _ in 0..5 {
        assert_eq!(text(send(&client, get(url(server.addr))).await.unwrap()).await.unwrap(), "hello");
    }
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn idle_connections_are_bounded() {
    let all = Arc::new(Barrier::new(2 * MAX_IDLE));
    let mut server = http(move |_| {
        let all = Arc::clone(&all);
        async move {
            all.wait().await;
            answer("hello")
        }
    })
    .await;
    let client = client();
    let requests = (0..2 * MAX_IDLE).map(|_| async {
        text(send(&client, get(url(server.addr))).await.unwrap()).await.unwrap();
    });
    futures::future::join_all(requests).await;
    assert_eq!(server.accepted(), 2 * MAX_IDLE);
    server.until(|counts| counts.open == MAX_IDLE).await;
}

#[tokio::test]
async fn a_connection_that_the_server_closed_is_replaced() {
    let server = http(|_| async {
        let mut answer = answer("hello");
        answer.headers_mut().insert("connection", "close".parse().unwrap());
        answer
    })
    .await;
    let client = client();
    for connections in 1..=3 {
        assert_eq!(text(send(&client, get(url(server.addr))).await.unwrap()).await.unwrap(), "hello");
        assert_eq!(server.accepted(), connections);
    }
}

/// Answers the first request of a connection, and hangs up on the second when it has read it.
async fn fickle(mut stream: TcpStream) {
    let mut buffer = [0; 1024];
    if stream.read(&mut buffer).await.is_ok_and(|length| length > 0) {
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await.unwrap();
        stream.read_u8().await.ok();
    }
}

#[tokio::test]
async fn a_request_that_meets_a_closing_connection_is_sent_again_if_it_may_be() {
    let server = raw(fickle).await;
    let client = client();
    for connections in 1..=3 {
        assert_eq!(text(send(&client, get(url(server.addr))).await.unwrap()).await.unwrap(), "hello");
        assert_eq!(server.accepted(), connections);
    }
    // One with consequences is not, nor one with a body that is gone; both reach the kept connection.
    let mut post = get(url(server.addr));
    *post.method_mut() = Method::POST;
    assert_eq!(failure(send(&client, post).await), Failure::Terminated);
    assert_eq!(text(send(&client, get(url(server.addr))).await.unwrap()).await.unwrap(), "hello");
    let mut put = super::post(url(server.addr), "body");
    *put.method_mut() = Method::PUT;
    assert_eq!(failure(send(&client, put).await), Failure::Terminated);
    assert_eq!(server.accepted(), 4);
}

#[tokio::test]
async fn a_new_connection_that_closes_is_not_tried_again() {
    let server = raw(|mut stream| async move {
        stream.read_u8().await.ok();
    })
    .await;
    assert_eq!(failure(send(&client(), get(url(server.addr))).await), Failure::Terminated);
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn the_last_clone_takes_idle_connections_with_it() {
    let mut server = http(|_| async { answer("hello") }).await;
    let client = client();
    let clone = client.clone();
    text(send(&client, get(url(server.addr))).await.unwrap()).await.unwrap();
    drop(client);
    text(send(&clone, get(url(server.addr))).await.unwrap()).await.unwrap();
    assert_eq!(server.accepted(), 1);
    drop(clone);
    server.until(|counts| counts.open == 0).await;
}

#[tokio::test]
async fn the_last_clone_takes_requests_in_flight_with_it() {
    let mut server = http(|_| std::future::pending()).await;
    let client = client();
    let request = tokio::spawn(client.send(get(url(server.addr)), Timeouts::default()));
    server.until(|counts| counts.open == 1).await;
    drop(client);
    assert_eq!(failure(timeout(PATIENCE, request).await.unwrap().unwrap()), Failure::Terminated);
    server.until(|counts| counts.open == 0).await;
}

#[tokio::test]
async fn a_request_that_nobody_waits_for_is_cut() {
    let mut server = http(|_| std::future::pending()).await;
    let client = client();
    let request = tokio::spawn(client.send(get(url(server.addr)), Timeouts::default()));
    server.until(|counts| counts.open == 1).await;
    request.abort();
    server.until(|counts| counts.open == 0).await;
}

#[tokio::test]
async fn close_waits_until_everything_has_ended() {
    let mut server = http(|_| async { answer("hello") }).await;
    let client = client();
    text(send(&client, get(url(server.addr))).await.unwrap()).await.unwrap();
    timeout(PATIENCE, client.close()).await.unwrap();
    assert!(client.0.spawner.tasks.is_empty());
    server.until(|counts| counts.open == 0).await;
    assert_eq!(failure(send(&client, get(url(server.addr))).await), Failure::Terminated);
}

#[tokio::test]
async fn what_is_not_allowed_is_not_even_connected_to() {
    let server = http(|_| async { answer("hello") }).await;
    let port = server.addr.port();
    let here = || get(url(server.addr));
    for policy in ["none", "127.0.0.2", "127.0.0.1:1", "*.example.com"] {
        assert_eq!(failure(send(&Client::new(&settings(policy)), here()).await), Failure::Denied, "{policy}");
    }
    // Denied before anybody is asked for its address.
    let name = get("http://no-such-name.invalid/");
    assert_eq!(failure(send(&Client::new(&settings("127.0.0.1")), name).await), Failure::Denied);
    assert_eq!(server.accepted(), 0);
    let client = Client::new(&settings(&format!("*.example.com, 127.0.0.1:{port}")));
    assert_eq!(text(send(&client, here()).await.unwrap()).await.unwrap(), "hello");
}

#[tokio::test]
async fn the_next_address_of_a_name_is_tried() {
    let server = http(|_| async { answer("hello") }).await;
    let root = image("/etc/hosts", "127.0.0.2 web\n127.0.0.1 web.\n");
    let client = Client::new(&ClientSettings { names: names(Some(root.path()), Network::host()), ..settings("web") });
    let request = get(format!("http://WEB:{}/", server.addr.port()));
    assert_eq!(text(send(&client, request).await.unwrap()).await.unwrap(), "hello");
}

#[tokio::test]
async fn a_silent_address_leaves_time_for_the_next() {
    let server = http(|_| async { answer("hello") }).await;
    let (silent, _full) = full(&format!("127.0.0.2:{}", server.addr.port())).await;
    let root = image("/etc/hosts", "127.0.0.2 web\n127.0.0.1 web\n");
    let client = Client::new(&ClientSettings { names: names(Some(root.path()), Network::host()), ..settings("all") });
    let request = get(format!("http://web:{}/", silent.port()));
    let exchange = send_in(&client, request, short(1_000, 60_000, 60_000)).await.unwrap();
    assert_eq!(text(exchange).await.unwrap(), "hello");
}

#[tokio::test]
async fn a_pods_requests_stay_in_its_network() {
    let namespaces = Namespaces { network: Namespace::New, ..Default::default() };
    // Making a network takes privileges, and its loopback interface a tool.
    let Ok(anchor) = Anchor::start(&namespaces, None) else { return };
    let net = format!("--net=/proc/{}/ns/net", anchor.tid());
    let up = std::process::Command::new("nsenter").args([&net, "ip", "link", "set", "lo", "up"]).status();
    if !up.is_ok_and(|status| status.success()) {
        return;
    }
    let addr = "127.0.0.1:0".parse().unwrap();
    let listener = crate::pod::listen(anchor.network().bind(addr).unwrap(), addr, 8).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let inside = serving(listener, |stream| connection(stream, |_| async { answer("inside") }));
    let (network, names) = (anchor.network(), names(None, anchor.network()));
    let pod = Client::new(&ClientSettings { network, names, ..settings("all") });
    assert_eq!(text(send(&pod, get(url(inside.addr))).await.unwrap()).await.unwrap(), "inside");
    let named = get(format!("http://localhost:{}/", inside.addr.port()));
    assert_eq!(text(send(&pod, named).await.unwrap()).await.unwrap(), "inside");

    let outside = raw(|_| async {}).await;
    assert_eq!(failure(send(&pod, get(url(outside.addr))).await), Failure::Refused);
    assert!(
        matches!(failure(send(&pod, get("http://db.example/")).await), Failure::Dns(why) if why.contains("db.example"))
    );
    tokio::task::spawn_blocking(move || drop(anchor)).await.unwrap();
    let late = failure(send(&pod, get(url(outside.addr))).await);
    assert!(matches!(late, Failure::Unavailable(why) if why == "the pod is gone"));
}
