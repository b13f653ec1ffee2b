//! The requests that each state allows. Pure.
//!
//! ```text
//!                 stop              abandon
//!   running ─────────────▶ stopped ─────────▶ gone
//!      ▲  ◀─────────────      │
//!      │ start   resume       └ save_state
//!   loaded ◀──────── prepared ◀──────── incoming
//!      │  load_state    │     prepare      ▲
//!      └────────────────┴──────────────────┘
//!                     reset
//! ```
//! A request is answered as done if its end state is reached already.

use std::fmt;

/// The VM's state in the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmState {
    /// vCPUs run.
    Running,
    /// vCPUs are stopped; memory is kept.
    Stopped,
    /// Waits to be a destination; has no memory.
    Incoming,
    /// The layout is made and attached.
    Prepared,
    /// The device state is loaded.
    Loaded,
    /// The VM has moved away.
    Gone,
}

impl VmState {
    /// As the protocol names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Incoming => "incoming",
            Self::Prepared => "prepared",
            Self::Loaded => "loaded",
            Self::Gone => "gone",
        }
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A request of the daemon, without its fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
#[expect(missing_docs, reason = "named and described in docs/reference/vmm-protocol.md")]
pub enum Verb {
    AttachMemory,
    Stop,
    SaveState,
    Resume,
    Abandon,
    Prepare,
    LoadState,
    Start,
    MigrationComplete,
    Reset,
}

impl Verb {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::AttachMemory,
        Self::Stop,
        Self::SaveState,
        Self::Resume,
        Self::Abandon,
        Self::Prepare,
        Self::LoadState,
        Self::Start,
        Self::MigrationComplete,
        Self::Reset,
    ];

    /// As the protocol names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::AttachMemory => "attach_memory",
            Self::Stop => "stop",
            Self::SaveState => "save_state",
            Self::Resume => "resume",
            Self::Abandon => "abandon",
            Self::Prepare => "prepare",
            Self::LoadState => "load_state",
            Self::Start => "start",
            Self::MigrationComplete => "migration_complete",
            Self::Reset => "reset",
        }
    }

    /// States that allow it.
    pub fn required(self) -> &'static [VmState] {
        match self {
            Self::AttachMemory => &[VmState::Running, VmState::Stopped],
            Self::Stop | Self::MigrationComplete => &[VmState::Running],
            Self::SaveState | Self::Resume | Self::Abandon => &[VmState::Stopped],
            Self::Prepare => &[VmState::Incoming],
            Self::LoadState => &[VmState::Prepared],
            Self::Start => &[VmState::Loaded],
            Self::Reset => &[VmState::Prepared, VmState::Loaded],
        }
    }

    /// The state after it; `None` where it changes none.
    pub fn end_state(self) -> Option<VmState> {
        match self {
            Self::AttachMemory | Self::SaveState | Self::MigrationComplete => None,
            Self::Stop => Some(VmState::Stopped),
            Self::Resume | Self::Start => Some(VmState::Running),
            Self::Abandon => Some(VmState::Gone),
            Self::Prepare => Some(VmState::Prepared),
            Self::LoadState => Some(VmState::Loaded),
            Self::Reset => Some(VmState::Incoming),
        }
    }
}

/// The decision about a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Carry it out.
    Do,
    /// Answer it as done.
    Done,
    /// BAD_STATE, with this text.
    Refuse(String),
}

/// Decides on a request.
pub fn decide(state: VmState, verb: Verb) -> Decision {
    if verb.required().contains(&state) {
        return Decision::Do;
    }
    if verb.end_state() == Some(state) {
        return Decision::Done;
    }
    let required: Vec<_> = verb.required().iter().map(|s| s.name()).collect();
    Decision::Refuse(format!("{} needs a VM that is {}; this one is {state}", verb.name(), required.join(" or ")))
}

#[cfg(test)]
mod tests;
