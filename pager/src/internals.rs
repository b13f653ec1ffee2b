//! The parts of the pager that the benchmark and the integration tests use. The product itself needs [`crate::run`] alone.

pub use crate::destination::needed_features;
pub use crate::destination::page_table::PageTable;
pub use crate::layout::address_map::PageIndex;
pub use crate::layout::page_run::Arrival;
pub use crate::layout::{Backing, Gpa, Hva, MemoryLayout, Region};
pub use crate::pager::Pager;
pub use crate::program::serve_vm;
pub use crate::sched::cpu_set::CpuSet;
pub use crate::server::memory_socket::{bind_private, serve_within};
pub use crate::source::memory::{Found, GuestMemory, Runs};
pub use crate::source::push_order::PushOrder;
pub use crate::sys::doorbell::Doorbell;
pub use crate::sys::memfd::memfd;
pub use crate::sys::uffd_probe::probe;
pub use crate::sys::userfaultfd::{UffdEvent, Userfaultfd};
pub use crate::tuning::Tuning;
pub use crate::vmm::attached_memory::{AttachedFile, AttachedMemory, AttachedRegion};

/// CPU time of the calling thread and of this process.
pub mod cpu_time {
    pub use crate::sched::cpu_time::{process_time, thread_time};
}

/// Descriptors over a unix socket.
pub mod fd_passing {
    pub use crate::sys::fd_passing::{receive, send};
}

/// The scheduling class of the calling thread.
pub mod priority {
    pub use crate::sched::priority::{batch, favoured, realtime, yield_cpu};
}
