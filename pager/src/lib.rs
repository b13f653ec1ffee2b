//! Everything between a page fault and its resolution: one process for each VM that moves, on either side.

#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod destination;
mod event_log;
pub mod internals;
mod lane;
mod layout;
mod pager;
mod pager_error;
mod program;
mod sched;
mod server;
mod source;
#[allow(unsafe_code)]
mod sys;
mod tuning;
mod vmm;

pub use program::run;

/// Generated from `proto/`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("vmferry.v1");
}
