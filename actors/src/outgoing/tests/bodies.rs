//! Bodies in both directions: as they come, and no faster than the other side takes them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http_body::Frame;
use http_body_util::StreamBody;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;

use super::server::{Answer, answer, echo, http, https, raw};
use super::*;

type Pieces = mpsc::Sender<Result<Frame<Bytes>, BoxError>>;

/// A body that is written as the test goes on.
fn written() -> (Pieces, RequestBody) {
    let (pieces, mut written) = mpsc::channel(1);
    let stream = futures::stream::poll_fn(move |cx| written.poll_recv(cx));
    (pieces, StreamBody::new(stream).boxed_unsync())
}

async fn write(pieces: &Pieces, text: &'static str) {
    pieces.send(Ok(Frame::data(Bytes::from_static(text.as_bytes())))).await.unwrap();
}

/// A body without end, and how many of its bytes were asked for.
fn endless() -> (Arc<AtomicUsize>, RequestBody) {
    let asked = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&asked);
    let stream = futures::stream::repeat_with(move || {
        let piece = Bytes::from_static(&[b'.'; 16 << 10]);
        counter.fetch_add(piece.len(), Ordering::Relaxed);
        Ok(Frame::data(piece))
    });
    (asked, StreamBody::new(stream).boxed_unsync())
}

/// More than the kernel buffers of a connection, in both its ends.
const MUCH: usize = 64 << 20;

async fn chat(client: &Client, uri: String) {
    let (pieces, body) = written();
    let sending = tokio::spawn(client.send(Request::post(uri).body(body).unwrap(), Timeouts::default()));
    write(&pieces, "one").await;
    let Exchange { response, upload } = timeout(PATIENCE, sending).await.unwrap().unwrap().unwrap();
    let mut answers = response.into_body();
    // Each piece is back before the next is written: nothing waits for the end.
    for (expected, next) in [("one", Some("two")), ("two", Some("three")), ("three", None)] {
        let frame = timeout(PATIENCE, answers.frame()).await.unwrap().unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), expected);
        if let Some(next) = next {
            write(&pieces, next).await;
        }
    }
    drop(pieces);
    assert!(timeout(PATIENCE, answers.collect()).await.unwrap().unwrap().to_bytes().is_empty());
    timeout(PATIENCE, upload.sent()).await.unwrap().unwrap();
}

#[tokio::test]
async fn both_bodies_stream_at_once() {
    let server = http(echo).await;
    chat(&client(), url(server.addr)).await;
}

#[tokio::test]
async fn both_bodies_stream_at_once_over_http2() {
    let (server, pem) = https(&["h2"], echo).await;
    let root = image("/etc/ssl/certs/ca-certificates.crt", &pem);
    let client = Client::new(&ClientSettings { rootfs: Some(root.path().into()), ..settings("all") });
    chat(&client, format!("https://localhost:{}/", server.addr.port())).await;
}

#[tokio::test]
async fn trailers_pass_both_ways() {
    let server = http(echo).await;
    let (pieces, body) = written();
    let request = Request::post(url(server.addr)).header("trailer", "x-sum").header("te", "trailers");
    let client = client();
    let sending = tokio::spawn(client.send(request.body(body).unwrap(), Timeouts::default()));
    write(&pieces, "text").await;
    let trailers = [("x-sum".parse().unwrap(), "42".parse().unwrap())].into_iter().collect::<http::HeaderMap>();
    pieces.send(Ok(Frame::trailers(trailers.clone()))).await.unwrap();
    let exchange = timeout(PATIENCE, sending).await.unwrap().unwrap().unwrap();
    timeout(PATIENCE, exchange.upload.sent()).await.unwrap().unwrap();
    let body = exchange.response.into_body().collect().await.unwrap();
    assert_eq!(body.trailers(), Some(&trailers));
    assert_eq!(body.to_bytes(), "text");
}

#[tokio::test]
async fn a_server_that_does_not_read_stops_the_upload() {
    let server = raw(|stream| async move {
        stream.writable().await.ok();
        std::future::pending::<()>().await;
    })
    .await;
    let (asked, body) = endless();
    let request = Request::post(url(server.addr)).body(body).unwrap();
    let refused = failure(send_in(&client(), request, short(60_000, 500, 60_000)).await);
    assert_eq!(refused, Failure::WriteTimeout);
    assert!(asked.load(Ordering::Relaxed) < MUCH);
}

#[tokio::test]
async fn a_guest_that_does_not_read_stops_the_server() {
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&sent);
    let server = http(move |_| {
        let (asked, body) = endless();
        counter.store(0, Ordering::Relaxed);
        let counter = Arc::clone(&counter);
        async move {
            Answer::new(
                body.map_frame(move |frame| {
                    counter.store(asked.load(Ordering::Relaxed), Ordering::Relaxed);
                    frame
                })
                .boxed_unsync(),
            )
        }
    })
    .await;
    let client = client();
    let exchange = send(&client, get(url(server.addr))).await.unwrap();
    // Until the server has had nothing to do for a while.
    let mut before = usize::MAX;
    while before != sent.load(Ordering::Relaxed) {
        before = sent.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!((1..MUCH).contains(&before), "{before}");
    let mut body = exchange.response.into_body();
    while sent.load(Ordering::Relaxed) == before {
        assert!(body.frame().await.unwrap().is_ok());
    }
}

#[tokio::test]
async fn an_upload_that_goes_on_is_no_silence() {
    let server = http(|request| async {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        answer(body)
    })
    .await;
    let (pieces, body) = written();
    let client = client();
    let request = Request::post(url(server.addr)).body(body).unwrap();
    // Six times 150 ms, with an answer only then: longer than the 500 ms of silence that are allowed.
    let sending = tokio::spawn(client.send(request, short(60_000, 500, 60_000)));
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        write(&pieces, ".").await;
    }
    drop(pieces);
    let exchange = timeout(PATIENCE, sending).await.unwrap().unwrap().unwrap();
    assert_eq!(text(exchange).await.unwrap(), "......");
}

#[tokio::test]
async fn the_guests_own_error_returns_to_it() {
    #[derive(Debug, thiserror::Error)]
    #[error("the guest's own")]
    struct Own;

    let server = http(echo).await;
    let client = client();
    // Before the response, from a server that waits for all of the request.
    let waiting = http(|request| async {
        drop(request.into_body().collect().await);
        answer("")
    })
    .await;
    let (pieces, body) = written();
    let request = Request::post(url(waiting.addr)).body(body).unwrap();
    let sending = tokio::spawn(client.send(request, Timeouts::default()));
    write(&pieces, "one").await;
    pieces.send(Err(Own.into())).await.unwrap();
    match timeout(PATIENCE, sending).await.unwrap().unwrap() {
        Err(SendError::RequestBody(error)) => assert!(error.is::<Own>()),
        other => panic!("{:?}", other.map(|exchange| exchange.response)),
    }
    // After the head of the response: whoever waits for the upload hears it, and the response does not end cleanly.
    let (pieces, body) = written();
    let sending = tokio::spawn(client.send(Request::post(url(server.addr)).body(body).unwrap(), Timeouts::default()));
    write(&pieces, "one").await;
    let exchange = timeout(PATIENCE, sending).await.unwrap().unwrap().unwrap();
    pieces.send(Err(Own.into())).await.unwrap();
    let unsent = timeout(PATIENCE, exchange.upload.sent()).await.unwrap().unwrap_err();
    assert!(matches!(unsent, SendError::RequestBody(error) if error.is::<Own>()));
    assert!(timeout(PATIENCE, exchange.response.into_body().collect()).await.unwrap().is_err());
}

#[tokio::test]
async fn a_declared_length_is_sent_when_it_is_reached() {
    let server = raw(|mut stream| async move {
        let mut request = vec![0; 4096];
        let mut length = 0;
        while !request[..length].ends_with(b"12345") {
            length += stream.read(&mut request[length..]).await.unwrap();
        }
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
    })
    .await;
    let (pieces, body) = written();
    let request = Request::post(url(server.addr)).header("content-length", "5").body(body).unwrap();
    let client = client();
    let sending = tokio::spawn(client.send(request, Timeouts::default()));
    write(&pieces, "12345").await;
    // Neither ended nor dropped: the length says that this was all.
    let exchange = timeout(PATIENCE, sending).await.unwrap().unwrap().unwrap();
    timeout(PATIENCE, exchange.upload.sent()).await.unwrap().unwrap();
    drop(pieces);
}
