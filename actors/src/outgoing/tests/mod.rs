//! Outgoing requests against servers on the loopback interface: good ones (`server`) and, byte by byte, bad ones (`raw`).

mod bodies;
mod failures;
mod pooling;
mod secure;
mod server;

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use tokio::time::timeout;

use super::*;
use crate::names::NameFiles;

/// Longer than anything here takes; the tests wait for events, not for this.
const PATIENCE: Duration = Duration::from_secs(20);

/// Names of an image at `rootfs`.
fn names(rootfs: Option<&std::path::Path>, network: Network) -> std::sync::Arc<Names> {
    let files = NameFiles { rootfs: rootfs.map(Into::into), hosts: None, resolv_conf: None };
    std::sync::Arc::new(Names::new(files, network))
}

fn settings(policy: &str) -> ClientSettings {
    ClientSettings {
        container: ContainerId::new("test", "outgoing"),
        policy: policy.parse().unwrap(),
        network: Network::host(),
        names: names(None, Network::host()),
        rootfs: None,
        certificates: None,
    }
}

fn client() -> Client {
    Client::new(&settings("all"))
}

fn get(uri: impl ToString) -> Request<RequestBody> {
    let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
    Request::get(uri.to_string()).body(body).unwrap()
}

fn post(uri: impl ToString, body: impl Into<Bytes>) -> Request<RequestBody> {
    let body = Full::new(body.into()).map_err(|never| match never {}).boxed_unsync();
    Request::post(uri.to_string()).body(body).unwrap()
}

fn url(addr: SocketAddr) -> String {
    format!("http://{addr}/")
}

/// Sends with the default timeouts.
async fn send(client: &Client, request: Request<RequestBody>) -> Result<Exchange, SendError> {
    send_in(client, request, Timeouts::default()).await
}

async fn send_in(client: &Client, request: Request<RequestBody>, timeouts: Timeouts) -> Result<Exchange, SendError> {
    timeout(PATIENCE, client.send(request, timeouts)).await.expect("the client's own timeouts come first")
}

/// The whole body of a response.
async fn text(exchange: Exchange) -> Result<String, Failure> {
    let body = timeout(PATIENCE, exchange.response.into_body().collect()).await.expect("a body that ends");
    Ok(String::from_utf8(body?.to_bytes().to_vec()).unwrap())
}

/// Why a request failed.
fn failure(result: Result<Exchange, SendError>) -> Failure {
    match result {
        Ok(exchange) => panic!("answered {}", exchange.response.status()),
        Err(SendError::Failed(failure)) => failure,
        Err(SendError::RequestBody(error)) => panic!("the request's body: {error}"),
    }
}

fn short(connect: u64, first_byte: u64, between_bytes: u64) -> Timeouts {
    let millis = Duration::from_millis;
    Timeouts { connect: millis(connect), first_byte: millis(first_byte), between_bytes: millis(between_bytes) }
}

/// A root filesystem with one file.
fn image(path: &str, text: &str) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join(path.trim_start_matches('/'));
    std::fs::create_dir_all(file.parent().unwrap_or(Path::new("/"))).unwrap();
    std::fs::write(file, text).unwrap();
    root
}
