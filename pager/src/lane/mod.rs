//! Lanes: plain TCP connections that carry pages, next to gRPC; the contract is in `proto/vmferry/v1/pages.proto`.

use std::os::fd::AsFd;

pub mod connect;
pub mod frame;
pub mod path;

/// Most pages of one DATA frame.
pub const MAX_FRAME_PAGES: u64 = 64;

/// Version of pages.proto that this program speaks.
pub const PROTOCOL_VERSION: u32 = 3;

/// Request metadata that carries the token of `OpenLane`.
pub const TOKEN_KEY: &str = "vmferry-lane-token";

/// Sets the TCP congestion control of a socket and of the connections that it accepts (tcp(7), `TCP_CONGESTION`); an empty
/// name keeps the host's. A name that the host does not know is logged, and the host's stays. Call it before there is a
/// connection: one that began with `bbr` keeps the pacing timer of `bbr` (`sk_pacing_status`, net/ipv4/tcp_bbr.c).
pub fn set_congestion_control(socket: &impl AsFd, name: &str) {
    if !name.is_empty()
        && let Err(error) = rustix::net::sockopt::set_tcp_congestion(socket, name)
    {
        tracing::warn!(congestion_control = name, %error, "lane.not_paced");
    }
}

#[cfg(test)]
pub(crate) mod tests;
