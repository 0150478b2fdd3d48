//! Sockets and names of WASI 0.3, from a command (`wasi:cli/run`).
//!
//!     lookup NAME            its addresses, one a line
//!     tcp ADDR TEXT          connects, sends the text, prints what comes back
//!     udp ADDR TEXT          sends one datagram, prints the one that comes back
//!
//! What the host refuses is the last line, as `error: …`, and exit code 1.
use std::net::SocketAddr;

use realloc as _;
use wasip3::cli::environment::get_arguments;
use wasip3::sockets::ip_name_lookup::resolve_addresses;
use wasip3::sockets::types::{
    IpAddress, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress, TcpSocket, UdpSocket,
};
use wasip3::wit_stream;

wasip3::cli::command::export!(Command);

struct Command;

impl wasip3::exports::cli::run::Guest for Command {
    async fn run() -> Result<(), ()> {
        let arguments = get_arguments();
        let words: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
        let done = match words[..] {
            ["lookup", name] => lookup(name).await,
            ["tcp", addr, text] => tcp(addr, text).await,
            ["udp", addr, text] => udp(addr, text).await,
            _ => panic!("{words:?}: see the header of net3/src/lib.rs"),
        };
        done.map_err(|why| println!("error: {why}"))
    }
}

async fn lookup(name: &str) -> Result<(), String> {
    for address in resolve_addresses(name.to_owned()).await.map_err(|code| format!("{code:?}"))? {
        match address {
            IpAddress::Ipv4((a, b, c, d)) => println!("{a}.{b}.{c}.{d}"),
            IpAddress::Ipv6(segments) => println!("{segments:?}"),
        }
    }
    Ok(())
}

async fn tcp(addr: &str, text: &str) -> Result<(), String> {
    let socket = TcpSocket::create(IpAddressFamily::Ipv4).map_err(|code| format!("{code:?}"))?;
    socket.connect(address(addr)).await.map_err(|code| format!("{code:?}"))?;
    let (mut writer, reader) = wit_stream::new();
    let sent = socket.send(reader);
    let left = writer.write_all(text.as_bytes().to_vec()).await;
    assert!(left.is_empty(), "the text is sent");
    drop(writer);
    sent.await.map_err(|code| format!("{code:?}"))?;
    let (incoming, received) = socket.receive();
    let answer = incoming.collect().await;
    received.await.map_err(|code| format!("{code:?}"))?;
    println!("{}", String::from_utf8_lossy(&answer));
    Ok(())
}

async fn udp(addr: &str, text: &str) -> Result<(), String> {
    let socket = UdpSocket::create(IpAddressFamily::Ipv4).map_err(|code| format!("{code:?}"))?;
    socket.send(text.as_bytes().to_vec(), Some(address(addr))).await.map_err(|code| format!("{code:?}"))?;
    let (answer, _from) = socket.receive().await.map_err(|code| format!("{code:?}"))?;
    println!("{}", String::from_utf8_lossy(&answer));
    Ok(())
}

fn address(addr: &str) -> IpSocketAddress {
    let Ok(SocketAddr::V4(addr)) = addr.parse() else { panic!("an address of IPv4 and a port") };
    let [a, b, c, d] = addr.ip().octets();
    IpSocketAddress::Ipv4(Ipv4SocketAddress { port: addr.port(), address: (a, b, c, d) })
}
