//! Page sizes, and the three ways to name a place in guest memory.

/// Bytes of a page on a lane, whatever the backing on either host.
pub const PAGE_SIZE: u64 = 4096;

/// Bytes of a transparent huge page on x86-64.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// A host-virtual address in the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hva(pub u64);

/// A guest-physical address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

/// A page of a region: the region's number in the layout and the page's index in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId {
    /// Number of the region.
    pub region: u32,
    /// Index of the page, in units of the region's page size.
    pub page: u64,
}
