//! Why an outgoing request failed.
//!
//! The variants are those of wasi:http's error-code that a client can meet, which are those of RFC 9209; `guest` turns one
//! into the other. Errors of hyper, rustls and the kernel are sorted into them here and nowhere else.

use std::error::Error as StdError;
use std::io;

use rustix::io::Errno;

use crate::names::LookupError;

/// A boxed error.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// Why an outgoing request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The `OUTGOING` setting does not allow it.
    #[error("the container's settings do not allow this destination")]
    Denied,
    #[error("the request has no usable host or scheme")]
    InvalidUri,
    #[error("CONNECT is not possible here")]
    InvalidMethod,
    #[error("the name look-up took too long")]
    DnsTimeout,
    /// The name has no address; in words.
    #[error("{0}")]
    Dns(String),
    #[error("connection refused")]
    Refused,
    /// Closed or reset before the answer, or because the container ends.
    #[error("the connection was closed")]
    Terminated,
    /// Name look-up, TCP and TLS together took too long, or no connection became free.
    #[error("connecting took too long")]
    ConnectTimeout,
    /// Nothing came for too long.
    #[error("the server was silent for too long")]
    ReadTimeout,
    /// The server took nothing of the request for too long.
    #[error("the server did not read for too long")]
    WriteTimeout,
    #[error("too many connections of this container, or open files of the shim")]
    TooManyConnections,
    #[error("there is no route to the address")]
    Unroutable,
    /// A packet filter or a policy of the kernel.
    #[error("the host forbids connecting to the address")]
    Prohibited,
    #[error("cannot connect: {0}")]
    Unavailable(String),
    #[error("TLS: {0}")]
    Tls(String),
    #[error("TLS certificate: {0}")]
    Certificate(String),
    #[error("TLS: the server says {text}")]
    Alert { id: u8, text: String },
    /// The response ended before it was complete.
    #[error("the response is incomplete")]
    Incomplete,
    /// The head of the response is larger than this many bytes, or has too many fields.
    #[error("the head of the response is larger than {0} bytes, or has too many fields")]
    HeadTooLarge(usize),
    #[error("the server switched to another protocol")]
    Upgraded,
    #[error("HTTP: {0}")]
    Protocol(String),
    /// The container's image or settings do not allow to even try; in words.
    #[error("{0}")]
    Configuration(String),
    #[error("internal error: {0}")]
    Internal(String),
}

impl From<LookupError> for Failure {
    fn from(error: LookupError) -> Self {
        match error {
            LookupError::Timeout(_) => Self::DnsTimeout,
            LookupError::NotFound(_) | LookupError::Failed { .. } => Self::Dns(error.to_string()),
        }
    }
}

impl Failure {
    /// What hyper says of a request that has no response yet. The client's limit of a head is `head` bytes.
    pub(super) fn of_request(error: &(dyn StdError + 'static), head: usize) -> Self {
        if let Some(failure) = cause::<Self>(error) {
            return failure.clone();
        }
        if let Some(io) = cause::<io::Error>(error) {
            return Self::of_stream(io);
        }
        match cause::<hyper::Error>(error) {
            Some(hyper) if hyper.is_parse_too_large() => Self::HeadTooLarge(head),
            Some(hyper) if hyper.is_incomplete_message() || hyper.is_closed() || hyper.is_canceled() => {
                Self::Terminated
            }
            Some(_) | None => Self::Protocol(words(error)),
        }
    }

    /// What hyper says of the body of a response.
    pub(super) fn of_body(error: &hyper::Error) -> Self {
        match cause::<io::Error>(error) {
            Some(io) => match io.kind() {
                io::ErrorKind::UnexpectedEof => Self::Incomplete,
                // How hyper reports chunks that are none.
                io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData if rustls_error(io).is_none() => {
                    Self::Protocol(io.to_string())
                }
                _ => Self::of_stream(io),
            },
            None if error.is_incomplete_message() => Self::Incomplete,
            None if error.is_closed() || error.is_canceled() => Self::Terminated,
            None => Self::Protocol(words(error)),
        }
    }

    /// Why a connection could not be made.
    pub(super) fn of_connect(error: &io::Error) -> Self {
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::CONNREFUSED) => Self::Refused,
            Some(Errno::TIMEDOUT) => Self::ConnectTimeout,
            Some(Errno::CONNRESET | Errno::CONNABORTED | Errno::PIPE) => Self::Terminated,
            Some(Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::NETDOWN | Errno::AFNOSUPPORT) => Self::Unroutable,
            Some(Errno::ACCESS | Errno::PERM) => Self::Prohibited,
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => Self::TooManyConnections,
            Some(_) | None => Self::Unavailable(error.to_string()),
        }
    }

    /// Why a connection ended, during the TLS handshake or later.
    pub(super) fn of_stream(error: &io::Error) -> Self {
        use rustls::Error as Tls;
        match rustls_error(error) {
            Some(Tls::AlertReceived(alert)) => Self::Alert { id: (*alert).into(), text: format!("{alert:?}") },
            Some(
                Tls::InvalidCertificate(_)
                | Tls::NoCertificatesPresented
                | Tls::UnsupportedNameType
                | Tls::InvalidCertRevocationList(_),
            ) => Self::Certificate(error.to_string()),
            Some(_) => Self::Tls(error.to_string()),
            None => Self::Terminated,
        }
    }
}

/// The error of rustls in one of the boxes of `io::Error` around it.
fn rustls_error(error: &io::Error) -> Option<&rustls::Error> {
    let inner = error.get_ref()?;
    inner.downcast_ref().or_else(|| inner.downcast_ref().and_then(rustls_error))
}

/// The first error of this type on the way down to the cause.
fn cause<'e, E: StdError + 'static>(error: &'e (dyn StdError + 'static)) -> Option<&'e E> {
    error.downcast_ref().or_else(|| error.source().and_then(cause))
}

/// An error with its causes: hyper keeps what matters in the last one.
fn words(error: &(dyn StdError + 'static)) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {}", words(source)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_of_the_kernel_are_told_apart() {
        let of = |errno: Errno| Failure::of_connect(&errno.into());
        assert_eq!(of(Errno::CONNREFUSED), Failure::Refused);
        assert_eq!(of(Errno::TIMEDOUT), Failure::ConnectTimeout);
        assert_eq!(of(Errno::NETUNREACH), Failure::Unroutable);
        assert_eq!(of(Errno::PERM), Failure::Prohibited);
        assert_eq!(of(Errno::MFILE), Failure::TooManyConnections);
        assert!(matches!(of(Errno::ADDRNOTAVAIL), Failure::Unavailable(why) if why.contains("address")));
    }

    #[test]
    fn an_error_of_tls_is_found_in_its_boxes() {
        let boxed = |error: rustls::Error| io::Error::other(io::Error::new(io::ErrorKind::InvalidData, error));
        let of = |error| Failure::of_stream(&boxed(error));
        assert!(matches!(of(rustls::Error::NoCertificatesPresented), Failure::Certificate(_)));
        assert!(matches!(of(rustls::Error::DecryptError), Failure::Tls(_)));
        let alert = of(rustls::Error::AlertReceived(rustls::AlertDescription::HandshakeFailure));
        assert_eq!(alert, Failure::Alert { id: 40, text: "HandshakeFailure".into() });
        assert_eq!(Failure::of_stream(&io::Error::from(io::ErrorKind::ConnectionReset)), Failure::Terminated);
    }
}
