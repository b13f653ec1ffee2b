//! The lanes of a source: the port, the urgent lane, the bulk lanes, and the sender that both use.

mod bulk_lane;
pub mod listener;
mod queue_limit;
#[allow(unsafe_code)]
mod sender;
mod urgent_lane;
