//! A server with sockets of its own. Not a route of web's, whose start is measured: each import costs one.
//!
//!     /connect?addr=ADDR     connects to ADDR, IPv4 and port: `connected`, or WASI's name of the error
//!     /hello                 hello
use std::net::SocketAddrV4;

use realloc as _;
use wasip2::http::types::{Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam};
use wasip2::sockets::instance_network::instance_network;
use wasip2::sockets::network::{ErrorCode, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress};
use wasip2::sockets::tcp_create_socket::create_tcp_socket;

wasip2::http::proxy::export!(Connect);

struct Connect;

impl wasip2::exports::http::incoming_handler::Guest for Connect {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let target = request.path_with_query().unwrap_or_default();
        match target.strip_prefix("/connect?addr=").map(|addr| addr.parse().map(open)) {
            None => answer(out, 200, "hello\n"),
            Some(Err(_)) => answer(out, 400, "no address\n"),
            Some(Ok(Ok(()))) => answer(out, 200, "connected\n"),
            Some(Ok(Err(code))) => answer(out, 200, code.name()),
        }
    }
}

fn open(addr: SocketAddrV4) -> Result<(), ErrorCode> {
    let [a, b, c, d] = addr.ip().octets();
    let to = IpSocketAddress::Ipv4(Ipv4SocketAddress { port: addr.port(), address: (a, b, c, d) });
    let socket = create_tcp_socket(IpAddressFamily::Ipv4)?;
    socket.start_connect(&instance_network(), to)?;
    loop {
        match socket.finish_connect() {
            Err(ErrorCode::WouldBlock) => socket.subscribe().block(),
            // The streams are children of the socket: they go first.
            done => return done.map(drop),
        }
    }
}

/// What the host does not take any more is nobody's loss.
fn answer(out: ResponseOutparam, status: u16, text: &str) {
    let response = OutgoingResponse::new(Fields::new());
    let _ = response.set_status_code(status);
    let body = response.body();
    ResponseOutparam::set(out, Ok(response));
    let Ok(body) = body else { return };
    if let Ok(stream) = body.write() {
        let _ = stream.blocking_write_and_flush(text.as_bytes());
    }
    let _ = OutgoingBody::finish(body, None);
}
