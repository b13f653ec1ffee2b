//! Everything between a page fault and its resolution: one process for each VM that moves, on either side.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod arriving;
pub mod aside;
pub mod assembly;
pub mod attached;
pub mod awake;
pub mod bulk;
pub mod claim;
pub mod clock;
pub mod collapse;
pub mod commands;
pub mod control;
pub mod descriptors;
pub mod destination;
pub mod doorbell;
pub mod events;
pub mod fault_loop;
mod guarded;
pub mod guest_memory;
pub mod histogram;
pub mod inflow;
pub mod install;
pub mod landing;
pub mod lane;
pub mod memory_message;
pub mod memory_socket;
pub mod page_file;
pub mod page_table;
pub mod pager;
pub mod placement;
pub mod priority;
pub mod program;
pub mod pushed_lane;
pub mod ready;
pub mod region_map;
pub mod resolver;
pub mod rest;
pub mod serve;
pub mod shared;
pub mod spin;
pub mod teller;
pub mod tuning;
pub mod userfaultfd;
pub mod weight;

/// Generated from `proto/`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("vmferry.v1");
}
