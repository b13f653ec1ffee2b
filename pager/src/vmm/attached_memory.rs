//! The memory that a VMM handed over on the memory socket.

use std::os::fd::OwnedFd;

use crate::layout::{Hva, MemoryLayout};

/// The memory of one VM, as its VMM attached it; `regions` are those of `layout`, in its order.
#[derive(Debug)]
pub struct AttachedMemory {
    /// The process with the regions in its address space.
    pub vmm_pid: u32,
    /// The attached memory.
    pub layout: MemoryLayout,
    /// The place of each region of the layout.
    pub regions: Vec<AttachedRegion>,
    /// The VMM's userfaultfds; a source has none.
    pub uffds: Vec<OwnedFd>,
    /// Its regions of 4 KiB pages are to be made of huge ones after the end.
    pub collapse: bool,
}

/// The place of one region.
#[derive(Debug)]
pub struct AttachedRegion {
    /// First byte in the VMM's address space.
    pub hva: Hva,
    /// The file behind it, where the backing is one.
    pub file: Option<AttachedFile>,
    /// Index of the userfaultfd that it is registered with, on a destination.
    pub uffd: Option<usize>,
}

/// A file that holds a region's bytes.
#[derive(Debug)]
pub struct AttachedFile {
    /// The memfd, or a snapshot's memory file.
    pub fd: OwnedFd,
    /// Offset of the region's first byte in it.
    pub offset: u64,
}

impl AttachedFile {
    /// Another descriptor of the same file.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, offset: self.offset })
    }
}
