//! Outgoing requests of a guest: wasi:http's hooks onto the container's [`Client`].
//!
//! Only translates: bodies, timeouts and errors. What happens to a request is the client's business.
//!
//! Invariant: a request's body is complete only if its guest lived to say so. To wasmtime the body of a guest that is gone
//! looks finished, and a server would take what a trap or a kill has cut for the whole. So the store must drop its hooks
//! before its table of resources: declare them in that order.

use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderName;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use wasmtime_wasi_http::{Error, RequestOptions, Result, WasiBody, WasiHttpHooks};

use crate::outgoing::{BoxError, Client, Exchange, Failure, SendError, Timeouts};
use crate::users::at_home;

/// Writes of an answer's body that wait for the client before its guest has to, and the largest of each in bytes: 1 MiB in
/// all, as wasmtime-wasi-http has it, but a guest that writes a little at a time gets as far as one that writes at once.
const BODY_CHUNKS: usize = 16;
const BODY_CHUNK: usize = 64 << 10;

/// How a guest's own wasi:http calls reach the world. A clone is for another guest.
#[derive(Default)]
pub struct Hooks {
    /// `None` sends nothing anywhere.
    client: Option<Arc<Client>>,
    /// Lives as long as the guest; made for its first request.
    life: Option<Arc<()>>,
}

impl Hooks {
    /// Hooks that send requests with `client`.
    pub fn new(client: Option<Client>) -> Self {
        Self { client: client.map(Arc::new), life: None }
    }

    /// Hooks to be cloned on another thread: the clones count apart from these.
    pub fn apart(&self) -> Self {
        Self::new(self.client.as_deref().cloned())
    }
}

impl Clone for Hooks {
    fn clone(&self) -> Self {
        Self { client: self.client.clone(), life: None }
    }
}

/// What becomes of a body that is being sent.
type Io = Box<dyn Future<Output = Result<()>> + Send>;

/// A request's body as its guest writes it, as long as there is one.
struct Written {
    body: WasiBody,
    guest: Weak<()>,
}

impl Body for Written {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        match frame {
            Poll::Ready(None) if self.guest.strong_count() == 0 => Poll::Ready(Some(Err(Error::ConnectionTerminated))),
            frame => frame,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl WasiHttpHooks for Hooks {
    // Asked for each field of each head; the default makes an `Arc` and nine names every time.
    fn is_forbidden_header(&mut self, name: &HeaderName) -> bool {
        matches!(
            name.as_str(),
            "connection"
                | "keep-alive"
                | "proxy-authenticate"
                | "proxy-authorization"
                | "proxy-connection"
                | "transfer-encoding"
                | "upgrade"
                | "host"
                | "http2-settings"
        )
    }

    fn p2_outgoing_body_buffer_chunks(&mut self) -> usize {
        BODY_CHUNKS
    }

    fn p2_outgoing_body_chunk_size(&mut self) -> usize {
        BODY_CHUNK
    }

    fn p3_outgoing_body_chunk_size(&mut self) -> usize {
        BODY_CHUNK
    }

    fn send_request(
        &mut self,
        request: http::Request<WasiBody>,
        options: Option<RequestOptions>,
        _response_processed: Io,
    ) -> Box<dyn Future<Output = Result<(http::Response<WasiBody>, Io)>> + Send> {
        let Some(client) = &self.client else { return Box::new(async { Err(Error::HttpRequestDenied) }) };
        let guest = Arc::downgrade(self.life.get_or_insert_default());
        let request = request.map(|body| Written { body, guest }.map_err(BoxError::from).boxed_unsync());
        let sending = at_home(client.send(request, timeouts(options)));
        Box::new(async move {
            let Exchange { response, upload } = sending.await.map_err(unsent)?;
            let response = response.map(|body| body.map_err(error).boxed_unsync());
            let io: Io = Box::new(async move {
                let sent = upload.sent().await.map_err(unsent);
                // A server may answer and not wait for the rest of a body. wasmtime's WASI 0.3 would take an error that is
                // there at once for the request's, and drop the response.
                if sent.is_err() {
                    tokio::task::yield_now().await;
                }
                sent
            });
            Ok((response, io))
        })
    }
}

fn timeouts(options: Option<RequestOptions>) -> Timeouts {
    let (options, default) = (options.unwrap_or_default(), Timeouts::default());
    let or = |asked: Option<Duration>, default| asked.unwrap_or(default);
    Timeouts {
        connect: or(options.connect_timeout, default.connect),
        first_byte: or(options.first_byte_timeout, default.first_byte),
        between_bytes: or(options.between_bytes_timeout, default.between_bytes),
    }
}

fn unsent(unsent: SendError) -> Error {
    match unsent {
        SendError::Failed(failure) => error(failure),
        // The guest's own error returns to it as it was.
        SendError::RequestBody(body) => {
            body.downcast::<Error>().map_or_else(|other| Error::InternalError(Some(other.to_string())), |own| *own)
        }
    }
}

/// The error-code for a failure.
fn error(failure: Failure) -> Error {
    match failure {
        Failure::Denied => Error::HttpRequestDenied,
        Failure::InvalidUri => Error::HttpRequestUriInvalid,
        Failure::InvalidMethod => Error::HttpRequestMethodInvalid,
        Failure::DnsTimeout => Error::DnsTimeout,
        Failure::Dns(why) => Error::DnsError { rcode: Some(why), info_code: None },
        Failure::Refused => Error::ConnectionRefused,
        Failure::Terminated => Error::ConnectionTerminated,
        Failure::ConnectTimeout => Error::ConnectionTimeout,
        Failure::ReadTimeout => Error::ConnectionReadTimeout,
        Failure::WriteTimeout => Error::ConnectionWriteTimeout,
        Failure::TooManyConnections => Error::ConnectionLimitReached,
        Failure::Unroutable => Error::DestinationIpUnroutable,
        Failure::Prohibited => Error::DestinationIpProhibited,
        Failure::Unavailable(_) => Error::DestinationUnavailable,
        Failure::Tls(_) => Error::TlsProtocolError,
        Failure::Certificate(_) => Error::TlsCertificateError,
        Failure::Alert { id, text } => Error::TlsAlertReceived { alert_id: Some(id), alert_message: Some(text) },
        Failure::Incomplete => Error::HttpResponseIncomplete,
        Failure::HeadTooLarge(limit) => Error::HttpResponseHeaderSectionSize(u32::try_from(limit).ok()),
        Failure::Upgraded => Error::HttpUpgradeFailed,
        Failure::Protocol(_) => Error::HttpProtocolError,
        Failure::Configuration(_) => Error::ConfigurationError,
        Failure::Internal(why) => Error::InternalError(Some(why)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_a_client_everything_is_denied() {
        let body = http_body_util::Empty::new().map_err(|never| match never {}).boxed_unsync();
        let request = http::Request::get("http://127.0.0.1/").body(body).unwrap();
        let sent = Hooks::default().send_request(request, None, Box::new(async { Ok(()) }));
        assert!(matches!(Box::into_pin(sent).await, Err(Error::HttpRequestDenied)));
    }

    #[tokio::test]
    async fn a_body_ends_cleanly_only_while_its_guest_lives() {
        for alive in [true, false] {
            let body = http_body_util::Full::new(Bytes::from("text"));
            let stream = http_body_util::BodyStream::new(body);
            let body =
                http_body_util::StreamBody::new(stream).map_err(|never: std::convert::Infallible| match never {});
            let mut hooks = Hooks::default();
            let guest = Arc::downgrade(hooks.life.get_or_insert_default());
            let mut body = Written { body: body.boxed_unsync(), guest };
            if !alive {
                drop(hooks);
            }
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "text");
            assert_eq!(body.frame().await.is_none(), alive);
        }
    }

    #[test]
    fn guests_neither_see_nor_set_what_the_connection_needs() {
        let mut hooks = Hooks::default();
        for name in &wasmtime_wasi_http::DEFAULT_FORBIDDEN_HEADERS {
            assert!(hooks.is_forbidden_header(name), "{name}");
            assert_eq!(hooks.forbidden_header_filter()(name), hooks.is_forbidden_header(name));
        }
        for name in ["content-type", "content-length", "te", "trailer", "cookie", "x-host"] {
            assert!(!hooks.is_forbidden_header(&HeaderName::from_static(name)), "{name}");
        }
    }

    #[test]
    fn what_the_guest_does_not_say_is_ours() {
        assert_eq!(timeouts(None), Timeouts::default());
        let second = Duration::from_secs(1);
        let options = RequestOptions { first_byte_timeout: Some(second), ..Default::default() };
        assert_eq!(timeouts(Some(options)), Timeouts { first_byte: second, ..Timeouts::default() });
    }

    #[test]
    fn a_guests_own_error_returns_as_it_was() {
        let own = SendError::RequestBody(Error::HttpRequestBodySize(Some(7)).into());
        assert!(matches!(unsent(own), Error::HttpRequestBodySize(Some(7))));
        let foreign = SendError::RequestBody("odd".into());
        assert!(matches!(unsent(foreign), Error::InternalError(Some(text)) if text == "odd"));
        assert!(matches!(unsent(Failure::Refused.into()), Error::ConnectionRefused));
    }
}
