//! Signals to the daemon itself: SIGTERM and SIGINT end it gracefully.

use futures::StreamExt as _;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook_tokio::Signals;

/// The signals, once each time they arrive. A second one means "now".
pub struct Stop(Signals);

impl Stop {
    /// Takes the signals over from here on. Needs a runtime.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub fn listen() -> std::io::Result<Self> {
        Signals::new([SIGTERM, SIGINT]).map(Self)
    }

    /// The next one, by name.
    pub async fn next(&mut self) -> &'static str {
        match self.0.next().await {
            Some(SIGINT) => "SIGINT",
            _ => "SIGTERM",
        }
    }
}
