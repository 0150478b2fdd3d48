//! The signals a container was sent, as its guest's task sees them.

/// What was sent so far. A command ends with the first; a server drains at the first and is cut off by the second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Signals {
    /// Number of the first signal, as in signal(7); zero while there is none.
    pub first: u8,
    /// Number of the last.
    pub last: u8,
    /// How many.
    pub count: u32,
}

impl Signals {
    /// One more.
    pub fn add(&mut self, signal: u8) {
        if self.count == 0 {
            self.first = signal;
        }
        self.last = signal;
        self.count = self.count.saturating_add(1);
    }
}
