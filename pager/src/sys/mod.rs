//! The Linux ABI: each file names its man page.

pub mod doorbell;
pub mod fd_passing;
pub(crate) mod nofault;
pub mod pagemap;
pub mod userfaultfd;
