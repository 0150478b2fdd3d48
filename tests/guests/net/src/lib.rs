//! Sockets and names of WASI 0.2, from a command (`wasi:cli/run`).
//!
//!     lookup NAME            its addresses, one a line
//!     tcp ADDR TEXT          connects, sends the text, prints what comes back
//!     tcp-serve ADDR         prints `listening`, sends one connection back what it sent
//!     udp ADDR TEXT          sends one datagram, prints the one that comes back
//!     udp-serve ADDR         prints `listening`, sends one datagram back
//!
//! What the host refuses is the last line, as `error: ACCESS-DENIED`, and exit code 1.
use std::net::SocketAddr;

use realloc as _;
use wasip2::cli::environment::get_arguments;
use wasip2::io::streams::{InputStream, OutputStream, StreamError};
use wasip2::sockets::instance_network::instance_network;
use wasip2::sockets::ip_name_lookup::resolve_addresses;
use wasip2::sockets::network::{
    ErrorCode, IpAddress, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress, Ipv6SocketAddress,
};
use wasip2::sockets::tcp::{ShutdownType, TcpSocket};
use wasip2::sockets::tcp_create_socket::create_tcp_socket;
use wasip2::sockets::udp::{OutgoingDatagram, UdpSocket};
use wasip2::sockets::udp_create_socket::create_udp_socket;

wasip2::cli::command::export!(Command);

struct Command;

impl wasip2::exports::cli::run::Guest for Command {
    fn run() -> Result<(), ()> {
        let arguments = get_arguments();
        let words: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
        let done = match words[..] {
            ["lookup", name] => lookup(name),
            ["tcp", addr, text] => tcp(parse(addr), text),
            ["tcp-serve", addr] => tcp_serve(parse(addr)),
            ["udp", addr, text] => udp(parse(addr), text),
            ["udp-serve", addr] => udp_serve(parse(addr)),
            _ => panic!("{words:?}: see the header of net/src/lib.rs"),
        };
        done.map_err(|code| println!("error: {}", code.name()))
    }
}

fn parse(addr: &str) -> SocketAddr {
    addr.parse().expect("an address and a port")
}

/// Asks again until the host has it ready.
fn ready<T>(wait: impl Fn(), mut ask: impl FnMut() -> Result<T, ErrorCode>) -> Result<T, ErrorCode> {
    loop {
        match ask() {
            Err(ErrorCode::WouldBlock) => wait(),
            done => return done,
        }
    }
}

fn lookup(name: &str) -> Result<(), ErrorCode> {
    let stream = resolve_addresses(&instance_network(), name)?;
    while let Some(address) = ready(|| stream.subscribe().block(), || stream.resolve_next_address())? {
        match address {
            IpAddress::Ipv4((a, b, c, d)) => println!("{a}.{b}.{c}.{d}"),
            IpAddress::Ipv6((a, b, c, d, e, f, g, h)) => {
                println!("{}", std::net::Ipv6Addr::new(a, b, c, d, e, f, g, h));
            }
        }
    }
    Ok(())
}

fn tcp(addr: SocketAddr, text: &str) -> Result<(), ErrorCode> {
    let socket = create_tcp_socket(family(addr))?;
    socket.start_connect(&instance_network(), address(addr))?;
    let (input, output) = ready(|| socket.subscribe().block(), || socket.finish_connect())?;
    output.blocking_write_and_flush(text.as_bytes()).expect("the text is sent");
    drop(output);
    socket.shutdown(ShutdownType::Send)?;
    let mut answer = Vec::new();
    while let Some(piece) = next(&input) {
        answer.extend(piece);
    }
    println!("{}", String::from_utf8_lossy(&answer));
    Ok(())
}

fn tcp_serve(addr: SocketAddr) -> Result<(), ErrorCode> {
    let socket: TcpSocket = create_tcp_socket(family(addr))?;
    socket.start_bind(&instance_network(), address(addr))?;
    ready(|| socket.subscribe().block(), || socket.finish_bind())?;
    socket.start_listen()?;
    ready(|| socket.subscribe().block(), || socket.finish_listen())?;
    println!("listening");
    let (connection, input, output) = ready(|| socket.subscribe().block(), || socket.accept())?;
    echo(&input, &output);
    drop((input, output));
    drop(connection);
    Ok(())
}

fn echo(input: &InputStream, output: &OutputStream) {
    while let Some(piece) = next(input) {
        output.blocking_write_and_flush(&piece).expect("the peer takes it back");
    }
}

fn next(input: &InputStream) -> Option<Vec<u8>> {
    match input.blocking_read(4096) {
        Ok(piece) => Some(piece),
        Err(StreamError::Closed) => None,
        Err(StreamError::LastOperationFailed(error)) => panic!("{}", error.to_debug_string()),
    }
}

fn bound(addr: SocketAddr) -> Result<UdpSocket, ErrorCode> {
    let socket = create_udp_socket(family(addr))?;
    socket.start_bind(&instance_network(), address(addr))?;
    ready(|| socket.subscribe().block(), || socket.finish_bind())?;
    Ok(socket)
}

fn udp(addr: SocketAddr, text: &str) -> Result<(), ErrorCode> {
    let any = if addr.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = bound(parse(any))?;
    let (incoming, outgoing) = socket.stream(Some(address(addr)))?;
    ready(
        || outgoing.subscribe().block(),
        || match outgoing.check_send()? {
            0 => Err(ErrorCode::WouldBlock),
            _ => Ok(()),
        },
    )?;
    outgoing.send(&[OutgoingDatagram { data: text.as_bytes().to_vec(), remote_address: None }])?;
    let answer = loop {
        match incoming.receive(1)?.pop() {
            Some(datagram) => break datagram.data,
            None => incoming.subscribe().block(),
        }
    };
    println!("{}", String::from_utf8_lossy(&answer));
    Ok(())
}

fn udp_serve(addr: SocketAddr) -> Result<(), ErrorCode> {
    let socket = bound(addr)?;
    let (incoming, outgoing) = socket.stream(None)?;
    println!("listening");
    let datagram = loop {
        match incoming.receive(1)?.pop() {
            Some(datagram) => break datagram,
            None => incoming.subscribe().block(),
        }
    };
    ready(
        || outgoing.subscribe().block(),
        || match outgoing.check_send()? {
            0 => Err(ErrorCode::WouldBlock),
            _ => Ok(()),
        },
    )?;
    let back = OutgoingDatagram { data: datagram.data, remote_address: Some(datagram.remote_address) };
    outgoing.send(&[back]).map(drop)
}

fn family(addr: SocketAddr) -> IpAddressFamily {
    if addr.is_ipv4() { IpAddressFamily::Ipv4 } else { IpAddressFamily::Ipv6 }
}

fn address(addr: SocketAddr) -> IpSocketAddress {
    match addr {
        SocketAddr::V4(addr) => {
            let [a, b, c, d] = addr.ip().octets();
            IpSocketAddress::Ipv4(Ipv4SocketAddress { port: addr.port(), address: (a, b, c, d) })
        }
        SocketAddr::V6(addr) => {
            let [a, b, c, d, e, f, g, h] = addr.ip().segments();
            IpSocketAddress::Ipv6(Ipv6SocketAddress {
                port: addr.port(),
                flow_info: 0,
                address: (a, b, c, d, e, f, g, h),
                scope_id: 0,
            })
        }
    }
}
