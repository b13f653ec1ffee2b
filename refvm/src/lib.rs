//! The reference VMM: a small real VMM with a real guest, and the example for authors of other VMMs that learn the
//! protocol of docs/reference/vmm-protocol.md.
//!
//! A [`machine::Machine`] is a guest that can be run, stopped, saved and loaded; `kvm` and `process` are its two kinds.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod admin;
pub mod cli;
pub mod control;
pub mod guest;
pub mod huge_pages;
pub mod inject;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod machine_thread;
pub mod memory;
pub mod memory_errors;
pub mod operation;
pub mod options;
pub mod pager_link;
pub mod pc;
pub mod process;
pub mod protocol;
pub mod report_reader;
pub mod sigbus;
pub mod userfaultfd;
pub mod vmm;
