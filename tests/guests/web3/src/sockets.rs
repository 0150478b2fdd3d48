//! A socket of this guest's own. What the host refuses is told as in `outgoing.rs`.
use std::net::SocketAddrV4;

use wasip3::http::types::Response;
use wasip3::sockets::types::{ErrorCode, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress, TcpSocket};

use crate::answer::text;
use crate::outgoing::refused;
use crate::query::value;

/// Of IPv4.
pub async fn connect(query: &str) -> Response {
    let Some(addr) = value(query, "addr").and_then(|addr| addr.parse().ok()) else {
        return text(400, "`addr=` and IP:PORT are missing\n");
    };
    match open(addr).await {
        Ok(()) => text(200, "connected\n"),
        Err(code) => refused(&code),
    }
}

async fn open(addr: SocketAddrV4) -> Result<(), ErrorCode> {
    let [a, b, c, d] = addr.ip().octets();
    let to = IpSocketAddress::Ipv4(Ipv4SocketAddress { port: addr.port(), address: (a, b, c, d) });
    TcpSocket::create(IpAddressFamily::Ipv4)?.connect(to).await
}
