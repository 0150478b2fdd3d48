//! The life of a container, without actix, tokio or a clock: which verb fits which state.
//!
//! ```text
//!   created ──start──▶ running ──(guest ends)──▶ stopped
//!      │               ▲     │                     ▲ ▲
//!      │        resume │     ▼ pause (native only) │ │
//!      │               paused ─────────────────────┘ │
//!      └────────── kill ─────────────────────────────┘
//! ```

use std::time::SystemTime;

use crate::ContainerId;
use crate::error::{Error, Result};

/// How a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The exit code (DESIGN.md, "Exit codes").
    pub code: u32,
    /// When.
    pub at: SystemTime,
}

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Everything is in place; the guest has not been started.
    Created,
    /// The guest runs.
    Running,
    /// It stands still.
    Paused,
    /// The guest is gone.
    Stopped(Exit),
}

impl Phase {
    /// The exit, once there is one.
    pub fn exit(self) -> Option<Exit> {
        match self {
            Self::Created | Self::Running | Self::Paused => None,
            Self::Stopped(exit) => Some(exit),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
        }
    }
}

/// What a signal does to a guest, which has no handlers: the default action of signal(7). A server takes time to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing; only tells whether there is somebody to signal.
    Nothing,
    /// The guest ends, with 128 + the signal.
    Terminate(u8),
}

/// What a `Kill` has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Killed {
    /// Nothing.
    Nothing,
    /// Nothing ran: it is stopped at once, with this code.
    Unstarted(u32),
    /// Interrupt the guest with this signal.
    Interrupt(u8),
}

/// The state of one container.
#[derive(Debug)]
pub struct State {
    id: ContainerId,
    phase: Phase,
    deleting: bool,
}

impl State {
    /// A created container.
    pub fn new(id: ContainerId) -> Self {
        Self { id, phase: Phase::Created, deleting: false }
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Created → running.
    pub fn start(&mut self) -> Result<()> {
        match self.phase {
            Phase::Created if !self.deleting => {
                self.phase = Phase::Running;
                Ok(())
            }
            Phase::Created | Phase::Running | Phase::Paused | Phase::Stopped(_) => Err(self.wrong("start")),
        }
    }

    /// The start did not come off: back to created, where it can be deleted.
    pub fn not_started(&mut self) {
        if self.phase == Phase::Running {
            self.phase = Phase::Created;
        }
    }

    /// What this signal does now.
    pub fn kill(&self, signal: u32) -> Result<Killed> {
        let action = action(signal)?;
        match (self.phase, action) {
            (Phase::Stopped(_), _) => Err(Error::AlreadyFinished(self.id.clone())),
            (_, Action::Nothing) => Ok(Killed::Nothing),
            (Phase::Created, Action::Terminate(signal)) => Ok(Killed::Unstarted(128 + u32::from(signal))),
            (Phase::Running | Phase::Paused, Action::Terminate(signal)) => Ok(Killed::Interrupt(signal)),
        }
    }

    /// Whether limits still matter.
    pub fn update(&self) -> Result<()> {
        match self.phase {
            Phase::Created | Phase::Running | Phase::Paused => Ok(()),
            Phase::Stopped(_) => Err(self.wrong("update")),
        }
    }

    /// Whether a native process can be signalled: what the signal does is its own affair.
    pub fn signal(&self, signal: u32) -> Result<()> {
        match self.phase {
            Phase::Stopped(_) => Err(Error::AlreadyFinished(self.id.clone())),
            _ if signal > 64 => Err(Error::invalid(format!("signal {signal}: there is none of this number"))),
            Phase::Created | Phase::Running | Phase::Paused => Ok(()),
        }
    }

    /// Whether `verb` (something with processes) can be done now.
    pub fn expect_running(&self, verb: &'static str) -> Result<()> {
        if self.phase == Phase::Running && !self.deleting { Ok(()) } else { Err(self.wrong(verb)) }
    }

    /// Whether another process can be executed in it: its namespaces are there before it is started.
    pub fn expect_executable(&self) -> Result<()> {
        match self.phase {
            Phase::Created | Phase::Running if !self.deleting => Ok(()),
            _ => Err(self.wrong("exec in")),
        }
    }

    /// Whether it can be resumed.
    pub fn expect_paused(&self) -> Result<()> {
        if self.phase == Phase::Paused { Ok(()) } else { Err(self.wrong("resume")) }
    }

    /// Running → paused; not if it has ended meanwhile.
    pub fn paused(&mut self) -> bool {
        let can = self.phase == Phase::Running;
        if can {
            self.phase = Phase::Paused;
        }
        can
    }

    /// Paused → running; not if it has ended meanwhile.
    pub fn resumed(&mut self) -> bool {
        let can = self.phase == Phase::Paused;
        if can {
            self.phase = Phase::Running;
        }
        can
    }

    /// The guest is gone. Told twice, the first exit stands.
    pub fn exited(&mut self, exit: Exit) -> bool {
        let first = self.phase.exit().is_none();
        if first {
            self.phase = Phase::Stopped(exit);
        }
        first
    }

    /// Nothing may run; true means "go and clean up", once.
    pub fn delete(&mut self) -> Result<()> {
        match self.phase {
            Phase::Running | Phase::Paused => Err(self.wrong("delete")),
            Phase::Created | Phase::Stopped(_) if self.deleting => Err(Error::NotFound(self.id.clone())),
            Phase::Created | Phase::Stopped(_) => {
                self.deleting = true;
                Ok(())
            }
        }
    }

    /// What is wrong with `verb` now.
    pub fn wrong(&self, verb: &'static str) -> Error {
        let state = if self.deleting { "being deleted" } else { self.phase.name() };
        Error::WrongState { id: self.id.clone(), verb, state }
    }
}

/// The default action of a signal, by number (Linux, x86 and arm).
fn action(signal: u32) -> Result<Action> {
    const CHLD: u8 = 17;
    const CONT: u8 = 18;
    const STOP: u8 = 19;
    const TTOU: u8 = 22;
    const URG: u8 = 23;
    const WINCH: u8 = 28;
    match u8::try_from(signal) {
        Ok(0 | CHLD | CONT | URG | WINCH) => Ok(Action::Nothing),
        Ok(STOP..=TTOU) => Err(Error::Unsupported(format!("signal {signal}: a guest cannot be paused yet"))),
        Ok(number @ 1..=64) => Ok(Action::Terminate(number)),
        Ok(_) | Err(_) => Err(Error::invalid(format!("signal {signal}: there is none of this number"))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EXIT: Exit = Exit { code: 3, at: SystemTime::UNIX_EPOCH };

    fn state() -> State {
        State::new(ContainerId::new("ns", "c"))
    }

    #[test]
    fn a_life_in_order() {
        let mut state = state();
        state.start().unwrap();
        assert!(matches!(state.start(), Err(Error::WrongState { state: "running", .. })));
        assert!(matches!(state.delete(), Err(Error::WrongState { verb: "delete", .. })));
        assert_eq!(state.kill(15).unwrap(), Killed::Interrupt(15));
        assert!(state.exited(EXIT));
        assert!(!state.exited(Exit { code: 4, ..EXIT }));
        assert_eq!(state.phase(), Phase::Stopped(EXIT));
        assert!(matches!(state.kill(9), Err(Error::AlreadyFinished(_))));
        assert!(matches!(state.start(), Err(Error::WrongState { state: "stopped", .. })));
        state.delete().unwrap();
        assert!(matches!(state.delete(), Err(Error::NotFound(_))));
    }

    #[test]
    fn a_kill_before_start_needs_no_guest() {
        let state = state();
        assert_eq!(state.kill(9).unwrap(), Killed::Unstarted(137));
        assert_eq!(state.kill(0).unwrap(), Killed::Nothing);
        assert_eq!(state.kill(28).unwrap(), Killed::Nothing);
        assert!(state.kill(19).is_err() && state.kill(65).is_err() && state.kill(u32::MAX).is_err());
    }

    #[test]
    fn a_native_container_can_be_paused() {
        let mut state = state();
        assert!(matches!(
            state.expect_running("pause"),
            Err(Error::WrongState { verb: "pause", state: "created", .. })
        ));
        state.expect_executable().unwrap();
        state.start().unwrap();
        state.expect_executable().unwrap();
        state.expect_running("pause").unwrap();
        assert!(state.expect_paused().is_err() && !state.resumed());
        assert!(state.paused() && !state.paused());
        state.expect_paused().unwrap();
        assert!(matches!(state.expect_executable(), Err(Error::WrongState { verb: "exec in", state: "paused", .. })));
        assert!(matches!(state.delete(), Err(Error::WrongState { state: "paused", .. })));
        assert!(state.start().is_err() && state.signal(9).is_ok() && state.signal(65).is_err());
        assert!(state.resumed());
        assert!(state.paused() && state.exited(EXIT));
        assert!(!state.resumed() && !state.paused());
        assert!(matches!(state.signal(9), Err(Error::AlreadyFinished(_))));
    }

    proptest! {
        #[test]
        fn no_order_of_verbs_leads_out_of_the_machine(verbs in prop::collection::vec(0..6_u8, 0..20)) {
            let mut state = state();
            let mut exits = 0;
            for verb in verbs {
                match verb {
                    0 => drop(state.start()),
                    1 => if let Ok(Killed::Unstarted(code)) = state.kill(9) {
                        exits += u32::from(state.exited(Exit { code, ..EXIT }));
                    },
                    3 => drop(state.paused()),
                    4 => drop(state.resumed()),
                    2 => if matches!(state.phase(), Phase::Running | Phase::Paused) { exits += u32::from(state.exited(EXIT)); },
                    _ => drop(state.delete()),
                }
            }
            prop_assert!(exits <= 1);
            prop_assert_eq!(exits == 1, state.phase().exit().is_some());
        }
    }
}
