//! Keeps new connections from a listener that is about to close.
//!
//! Closing a listener resets what its queue holds, so the queue is emptied first; but a connection that arrives between the
//! last `accept` and the `close` would be reset all the same. A filter that drops every packet keeps it out: the client's
//! kernel asks again and is refused by the closed port, or is sent to another server by then.

use std::io;
use std::os::fd::AsFd;

use socket2::{SockFilter, SockRef};

/// Lets no new connection in. What is in the queue stays there.
pub fn shut(listener: &impl AsFd) -> io::Result<()> {
    /// The classic filter `ret 0`: keep nothing of the packet.
    const RETURN: u16 = 0x06;
    SockRef::from(listener).attach_filter(&[SockFilter::new(RETURN, 0, 0, 0)])
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_came_before_is_kept_and_what_comes_after_is_not_let_in() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let _before = TcpStream::connect(addr).unwrap();
        shut(&listener).unwrap();
        assert!(TcpStream::connect_timeout(&addr, Duration::from_millis(50)).is_err());
        listener.set_nonblocking(true).unwrap();
        listener.accept().unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
