//! TLS: whom a container trusts, and which HTTP it speaks.

use std::path::Path;

use http::Version;

use super::server::{Server, answer, echo, https, raw};
use super::*;

fn local(server: &Server) -> String {
    format!("https://localhost:{}/", server.addr.port())
}

/// A client of a container whose image has this bundle.
fn trusting(bundle: &str) -> (Client, tempfile::TempDir) {
    let root = image("/etc/ssl/certs/ca-certificates.crt", bundle);
    (Client::new(&ClientSettings { rootfs: Some(root.path().into()), ..settings("all") }), root)
}

#[tokio::test]
async fn an_unknown_authority_is_not_trusted() {
    let (server, _) = https(&["http/1.1"], |_| async { answer("secret") }).await;
    let refused = failure(send(&client(), get(local(&server))).await);
    assert!(matches!(&refused, Failure::Certificate(why) if why.contains("UnknownIssuer")), "{refused:?}");
}

#[tokio::test]
async fn the_images_bundle_is_trusted_and_http2_shares_a_connection() {
    let (server, pem) = https(&["h2", "http/1.1"], |_| async { answer("secret") }).await;
    let (client, _root) = trusting(&pem);
    let exchange = send(&client, get(local(&server))).await.unwrap();
    assert_eq!(exchange.response.version(), Version::HTTP_2);
    assert_eq!(text(exchange).await.unwrap(), "secret");
    let requests = (0..20).map(|_| async { text(send(&client, get(local(&server))).await.unwrap()).await.unwrap() });
    assert!(futures::future::join_all(requests).await.iter().all(|text| text == "secret"));
    assert_eq!(server.accepted(), 1);
    // Nothing of this is a setting of the process.
    assert!(rustls::crypto::CryptoProvider::get_default().is_none());
}

#[tokio::test]
async fn a_server_without_http2_gets_http1() {
    for alpn in [&["http/1.1"][..], &[]] {
        let (server, pem) = https(alpn, echo).await;
        let (client, _root) = trusting(&pem);
        let exchange = send(&client, post(local(&server), "echoed")).await.unwrap();
        assert_eq!(exchange.response.version(), Version::HTTP_11);
        assert_eq!(text(exchange).await.unwrap(), "echoed");
    }
}

#[tokio::test]
async fn a_certificate_for_another_host_is_refused() {
    let (server, pem) = https(&["h2"], |_| async { answer("secret") }).await;
    let (client, _root) = trusting(&pem);
    let refused = failure(send(&client, get(format!("https://{}/", server.addr))).await);
    assert!(matches!(&refused, Failure::Certificate(why) if why.contains("not valid for name")), "{refused:?}");
}

#[tokio::test]
async fn the_bundle_that_the_environment_names_must_be_there() {
    let (server, pem) = https(&["h2"], |_| async { answer("secret") }).await;
    let root = image("/own.pem", &pem);
    let named = |file: &str| {
        let certificates = Some(Path::new(file).to_owned());
        Client::new(&ClientSettings { rootfs: Some(root.path().into()), certificates, ..settings("all") })
    };
    let client = named("/own.pem");
    let exchange = send(&client, get(local(&server))).await.unwrap();
    assert_eq!(text(exchange).await.unwrap(), "secret");
    let refused = failure(send(&named("/lost.pem"), get(local(&server))).await);
    assert!(matches!(&refused, Failure::Configuration(why) if why.contains("/lost.pem: no such file")), "{refused:?}");
}

#[tokio::test]
async fn a_server_without_tls_is_no_https_server() {
    let server = raw(|mut stream| async move {
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        // Not closed before the client has made up its mind.
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.ok();
    })
    .await;
    let refused = failure(send(&client(), get(local(&server))).await);
    assert!(matches!(&refused, Failure::Tls(_)), "{refused:?}");

    let closing = raw(|_| async {}).await;
    assert_eq!(failure(send(&client(), get(local(&closing))).await), Failure::Terminated);
}

#[tokio::test]
async fn a_handshake_counts_as_connecting() {
    let silent = raw(|stream| async move {
        tokio::io::copy(&mut { stream }, &mut tokio::io::sink()).await.ok();
    })
    .await;
    let request = send_in(&client(), get(local(&silent)), short(200, 60_000, 60_000)).await;
    assert_eq!(failure(request), Failure::ConnectTimeout);
}
