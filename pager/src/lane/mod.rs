//! Lanes: plain TCP connections beside gRPC on which pages travel; the contract is in `proto/vmferry/v1/pages.proto`.

pub mod connect;
pub mod frame;
pub mod path;

/// Most pages of one DATA frame.
pub const MAX_FRAME_PAGES: u64 = 64;

/// Version of pages.proto that this program speaks.
pub const PROTOCOL_VERSION: u32 = 3;

/// Request metadata that carries the token of `OpenLane`.
pub const TOKEN_KEY: &str = "vmferry-lane-token";
