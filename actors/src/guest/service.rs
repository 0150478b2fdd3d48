//! One request's visit to an instance of WASI 0.3.
//!
//! The guest's answer and its body are made by tasks inside the instance. Frames go into the exchange, which holds a few for
//! a client that is slow.
//!
//! Called by `shared.rs`.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;

use http::header::HOST;
use http::uri::{Authority, Scheme, Uri};
use http_body_util::BodyExt;
use wasmtime::component::Accessor;
use wasmtime_wasi_http::p3::Request;
use wasmtime_wasi_http::p3::bindings::Service;
use wasmtime_wasi_http::{WasiBody, WasiHttpView};

use super::exchange::Exchange;
use super::visitor::Visitor;

/// What became of the request's body.
type Sent = Pin<Box<dyn Future<Output = Result<(), wasmtime_wasi_http::Error>> + Send>>;

/// Serves one request, up to the end of its answer.
pub(super) async fn serve(
    accessor: &Accessor<Visitor>,
    service: &Service,
    request: http::Request<WasiBody>,
    exchange: &Arc<Exchange>,
) -> wasmtime::Result<()> {
    let (request, sent): (_, Sent) = accessor.with(|mut store| {
        let (request, sent) = Request::from_http(store.data_mut().http().hooks, with_authority(request));
        (request, Box::pin(sent) as Sent)
    });
    let response = match service.handle(accessor, request).await? {
        Ok(response) => response,
        Err(code) => {
            exchange.refuse(code);
            return Ok(());
        }
    };
    let response = accessor.with(|store| response.into_http(store, sent))?;
    let (head, mut body) = response.into_parts();
    exchange.answer(head);
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else {
            exchange.unfinished();
            return Ok(());
        };
        exchange.push(frame);
        // Without its body the guest's stream is closed, which tells it.
        if !poll_fn(|cx| exchange.poll_room(cx)).await {
            return Ok(());
        }
    }
    exchange.complete();
    Ok(())
}

/// With scheme and authority in the target, where WASI 0.3 looks for them: HTTP/1.1 has the authority in a header.
fn with_authority<B>(mut request: http::Request<B>) -> http::Request<B> {
    if request.uri().authority().is_some() {
        return request;
    }
    let host = request.headers().get(HOST);
    if let Some(authority) = host.and_then(|host| Authority::try_from(host.as_bytes()).ok()) {
        let mut parts = request.uri().clone().into_parts();
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = Some(authority);
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
    request
}
