//! Everything between a page fault and its resolution: one process for each VM that moves, on either side.

pub mod attached;
pub mod region_map;

/// Generated from `proto/`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("vmferry.v1");
}
