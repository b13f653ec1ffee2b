//! The Linux ABI that no library wraps: each file names its man page.
#![allow(unsafe_code)]

pub mod file_cache;
pub mod inherited;
pub mod memory;
pub mod pagemap;
pub mod ptrace;
pub mod signals;
pub mod userfaultfd;
pub mod vdso;
