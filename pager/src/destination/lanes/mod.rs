//! The lanes of a destination.

pub mod bulk_lane;
pub mod bulk_lanes;
pub mod bulk_thread;
pub mod receiver;
