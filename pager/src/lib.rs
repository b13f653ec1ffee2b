//! Everything between a page fault and its resolution: one process for each VM that moves, on either side.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod guest_memory;
pub mod attached;
pub mod descriptors;
pub mod events;
pub mod histogram;
pub mod page_file;
pub mod page_table;
pub mod placement;
pub mod region_map;
pub mod userfaultfd;
pub mod serve;

/// Generated from `proto/`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("vmferry.v1");
}
