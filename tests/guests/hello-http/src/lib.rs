//! The smallest HTTP server: `hello world` to every request. What a request costs besides the guest is measured with it.
//!
//! It asks the host for nothing but the response: no environment, no clock, no output. So nothing here may fail with a
//! message, and what cannot happen is dropped without a word.
use realloc as _;
use wasip2::http::types::{Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam};

const TEXT: &[u8] = b"hello world\n";

wasip2::http::proxy::export!(Hello);

struct Hello;

impl wasip2::exports::http::incoming_handler::Guest for Hello {
    fn handle(_request: IncomingRequest, out: ResponseOutparam) {
        let headers = Fields::new();
        let _ = headers.set("content-length", &[b"12".to_vec()]);
        let response = OutgoingResponse::new(headers);
        let body = response.body();
        ResponseOutparam::set(out, Ok(response));
        let Ok(body) = body else { return };
        if let Ok(stream) = body.write() {
            let _ = stream.blocking_write_and_flush(TEXT);
        }
        let _ = OutgoingBody::finish(body, None);
    }
}
