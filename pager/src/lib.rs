//! Everything between a page fault and its resolution: one process for each VM that moves, on either side.

#![cfg_attr(not(test), deny(unsafe_code))]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod destination;
pub mod event_log;
pub mod lane;
pub mod layout;
pub mod pager;
pub mod pager_error;
pub mod program;
pub mod sched;
pub mod server;
pub mod source;
#[allow(unsafe_code)]
pub mod sys;
pub mod tuning;
pub mod vmm;

/// Generated from `proto/`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("vmferry.v1");
}
