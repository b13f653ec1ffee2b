//! Steps into a VMM that runs already, so that vmferry can move it: one request, one reply.
//!
//! ```text
//!  request ─▶ program ─▶ identity   pid, start time and pidfd name one process; nobody traces it
//!                        rights     all capabilities but those of this request are dropped for good
//!                        operation  describe · empty · create_userfaultfd · close_userfaultfd · read_memory · probe
//!                          │ memory/   mappings, backing files, page tables: looked at from outside
//!                          │ inject/   one system call, run by a thread of the process
//!                        reply ─▶ descriptors over the socket, then standard output
//! ```
//!
//! Only `sys` holds `unsafe` code.

#![cfg_attr(test, allow(clippy::unwrap_used))]
#![deny(unsafe_code)]

pub mod error;
pub mod identity;
pub mod inject;
pub mod memory;
pub mod operation;
pub mod program;
pub mod rights;
pub mod sys;

/// Generated from `proto/`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/vmferry.v1.rs"));
}
