//! The VMM's handshake and memory, and the pager's notices to it.

pub mod attached_memory;
pub mod handshake;
pub mod notifier;
