//! The one table from how a guest ended to its exit code (DESIGN.md, "Exit codes").

use wasmtime::Trap;

use super::limits::OutOfMemory;

/// The guest's own `proc_exit(n)`: raised by our definition of it, because the stock one traps from 126 on.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("proc_exit({0})")]
pub struct ProcExit(pub u32);

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It returned, or said its code.
    Exited(u8),
    /// A component's `run` returned an error.
    RunFailed,
    /// It trapped; the text is for its log.
    Trapped(String),
    /// A signal ended it.
    Killed(u8),
    /// It wanted more memory than its container may have.
    OutOfMemory(String),
    /// The host failed it: a bug of ours, named in the log.
    HostFailed(String),
}

impl Outcome {
    /// The exit code that containerd is told.
    pub fn code(&self) -> u32 {
        match self {
            Self::Exited(code) => (*code).into(),
            Self::RunFailed => 1,
            Self::Trapped(_) => 134,
            Self::Killed(signal) => 128 + u32::from(*signal),
            Self::OutOfMemory(_) => 137,
            Self::HostFailed(_) => 255,
        }
    }

    /// What the reader of the container's log should be told beyond the code.
    pub fn note(&self) -> Option<&str> {
        match self {
            Self::Trapped(text) | Self::OutOfMemory(text) | Self::HostFailed(text) => Some(text),
            Self::Exited(_) | Self::RunFailed | Self::Killed(_) => None,
        }
    }

    /// What a guest's call came to.
    pub fn of(result: wasmtime::Result<()>) -> Self {
        match result {
            Ok(()) => Self::Exited(0),
            Err(error) => Self::of_error(&error),
        }
    }

    /// What an error that ended a guest came to.
    pub fn of_error(error: &wasmtime::Error) -> Self {
        // Linux keeps the low byte of an exit code.
        if let Some(ProcExit(code)) = error.downcast_ref() {
            return Self::Exited((code & 0xff) as u8);
        }
        if let Some(wasmtime_wasi::I32Exit(code)) = error.downcast_ref() {
            return Self::Exited((code & 0xff) as u8);
        }
        if error.downcast_ref::<OutOfMemory>().is_some() {
            return Self::OutOfMemory(format!("{error:#}"));
        }
        if error.downcast_ref::<RunFailed>().is_some() {
            return Self::RunFailed;
        }
        match error.downcast_ref::<Trap>() {
            Some(_) => Self::Trapped(format!("{error:?}")),
            // An error that a host function raised on the guest's behalf (a bad pointer, say) ends it like a trap.
            None => Self::Trapped(format!("{error:?}")),
        }
    }
}

/// A component's `wasi:cli/run` returned its error.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("wasi:cli/run returned an error")]
pub struct RunFailed;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_from_0_to_255_arrives() {
        for code in 0..=255_u8 {
            assert_eq!(Outcome::of(Err(ProcExit(code.into()).into())).code(), u32::from(code));
            assert_eq!(Outcome::of(Err(wasmtime_wasi::I32Exit(code.into()).into())).code(), u32::from(code));
        }
        assert_eq!(Outcome::of(Err(ProcExit(256 + 3).into())).code(), 3);
    }

    #[test]
    fn the_table_of_the_design() {
        assert_eq!(Outcome::of(Ok(())).code(), 0);
        assert_eq!(Outcome::of(Err(RunFailed.into())).code(), 1);
        assert_eq!(Outcome::of(Err(Trap::UnreachableCodeReached.into())).code(), 134);
        assert_eq!(Outcome::Killed(15).code(), 143);
        assert_eq!(Outcome::Killed(9).code(), 137);
        assert_eq!(Outcome::OutOfMemory(String::new()).code(), 137);
        assert_eq!(Outcome::HostFailed(String::new()).code(), 255);
    }
}
