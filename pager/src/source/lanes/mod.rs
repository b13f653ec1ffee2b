//! The lanes of a source: the port, the urgent lane, the bulk lanes, and the sender that both use.

mod bulk_lane;
mod frame_writer;
pub mod listener;
mod queue_limit;
mod sender;
mod urgent_lane;
