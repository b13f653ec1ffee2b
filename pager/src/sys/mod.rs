//! The Linux ABI: each file names its man page.

pub mod atomic_mapping;
pub mod doorbell;
pub mod fd_passing;
pub mod iovecs;
pub mod memfd;
pub mod memory_failure;
pub(crate) mod nofault;
pub mod other_process;
pub mod page_mapping;
pub mod pagemap;
pub mod poll;
pub mod procfs;
pub mod scheduling;
pub mod tcp;
#[cfg(test)]
pub mod testing;
pub mod uffd_probe;
pub mod userfaultfd;
