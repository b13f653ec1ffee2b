//! The reference VMM: a small real VMM with a real guest, and the example to read for whoever teaches another VMM the
//! protocol of docs/reference/vmm-protocol.md.
//!
//! A [`machine::Machine`] is a guest that can be run, stopped, saved and loaded; `kvm` and `process` are its two kinds.

pub mod guest;
pub mod machine;
