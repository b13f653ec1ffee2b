//! What the pager says to the VMM, and what the VMM hands over.

pub mod attached_memory;
pub mod handshake;
pub mod notifier;
