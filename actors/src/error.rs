//! What a verb can refuse, and why.
//!
//! A variant exists because a caller reacts differently to it; the edge maps each to one code of the task API
//! (`status.rs`). Messages name the thing, the cause and, where there is one, the way out: they are what a user of `ctr`
//! or `kubectl describe pod` reads.

use std::path::{Path, PathBuf};

use crate::ContainerId;

/// Result of a verb.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A refusal of a verb of the task API.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such container in this process.
    #[error("container {0}: not found")]
    NotFound(ContainerId),
    /// `Kill` of a container that has exited already (containerd relies on exactly these words and on `NotFound`).
    #[error("container {0}: process already finished")]
    AlreadyFinished(ContainerId),
    /// `Create` with an id that is taken.
    #[error("container {0}: already exists")]
    AlreadyExists(ContainerId),
    /// The verb does not fit the container's state.
    #[error("container {id}: cannot {verb}: it is {state}")]
    WrongState { id: ContainerId, verb: &'static str, state: &'static str },
    /// The bundle, its config or the request asks for something that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// The program of the image cannot run here: not wasm, missing, refused by the compiler.
    #[error("{0}")]
    Program(String),
    /// A thing that this version does not do.
    #[error("{0}")]
    Unsupported(String),
    /// The host refused: a mount, a namespace, a file.
    #[error("{what}: {source}")]
    Host { what: String, source: std::io::Error },
    /// The process is stopping and takes no further container.
    #[error("the shim is shutting down; try again, a new one will be started")]
    ShuttingDown,
    /// A promise inside the shim was broken; the log has more.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// The host refused `what` (a sentence without the cause).
    pub fn host(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::Host { what: what.into(), source: source.into() }
    }

    /// The host refused to do `verb` with the file at `path`.
    pub fn path(verb: &str, path: &Path, source: impl Into<std::io::Error>) -> Self {
        Self::host(format!("{verb} {}", PathBuf::from(path).display()), source)
    }

    /// Bad input, in words.
    pub fn invalid(text: impl Into<String>) -> Self {
        Self::Invalid(text.into())
    }
}

impl From<actix::MailboxError> for Error {
    /// A closed mailbox: the actor died (a panic in a handler) or the process is ending.
    fn from(error: actix::MailboxError) -> Self {
        Self::Internal(format!("an actor does not answer: {error}"))
    }
}
