//! The VMM protocol (docs/reference/vmm-protocol.md), pure: frames, messages, and which request is right in which state.
//! `control` and `pager_link` carry it; `vmm` acts on it.

pub mod frame;
pub mod message;
pub mod state;
