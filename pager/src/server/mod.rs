//! The two sockets that others connect to.

pub mod control;
pub mod memory_socket;
pub(crate) mod pages_service;
mod status;
