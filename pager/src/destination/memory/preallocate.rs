//! Memory of a destination's files made ready before the blackout: reserved, filled with zeros and mapped.
//!
//! It uses huge pages where they cost no more than small ones. That depends on the host: blocks are free, or the kernel has to
//! move other pages out of them, and a host that is a virtual machine itself may have to ask for them.

use std::io;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::retry_on_intr;

use crate::destination::memory::huge_page_policy::HugePagePolicy;
use crate::destination::memory::receive_mapping::ReceiveMapping;
use crate::layout::{HUGE_PAGE_SIZE, Hva, MemoryLayout, PAGE_SIZE};
use crate::proto::PageRange;
use crate::sched::cpu_time::thread_time;
use crate::sys::pagemap::{Pagemap, PagemapError};
use crate::sys::userfaultfd::Userfaultfd;
use crate::vmm::attached_memory::AttachedFile;

/// The file that takes a region's pages, and where the VMM has it mapped.
#[derive(Debug)]
pub struct PreallocateTarget {
    /// The file with the region's bytes.
    pub file: AttachedFile,
    /// The userfaultfd of the mapping.
    pub uffd: Userfaultfd,
    /// The process of the mapping.
    pub vmm_pid: u32,
    /// The mapping's first byte.
    pub hva: Hva,
    /// Its bytes.
    pub size: u64,
}

/// A plot, and how far it can be made ready.
struct PreparedRegion<'a> {
    target: &'a PreallocateTarget,
    /// Where pages can be received in place.
    receive_mapping: Option<ReceiveMapping>,
    /// Shows the pages that the VMM has mapped.
    mapped: Option<Pagemap>,
}

/// Why memory cannot be allocated ahead.
#[derive(Debug, thiserror::Error)]
pub enum PreallocateError {
    /// Pages have come, or may come.
    #[error("memory is allocated once, before lanes are connected")]
    TooLate,
    /// There is no memory to allocate.
    #[error("the VMM has not attached its memory")]
    NotAttached,
    /// No descriptor is free.
    #[error("descriptor: {0}")]
    Descriptor(#[source] io::Error),
    /// A range is not in the layout.
    #[error("held: region {region}, pages {page} + {count} of 4 KiB")]
    OutsideLayout {
        /// Number of the region.
        region: u32,
        /// First page.
        page: u64,
        /// Number of pages.
        count: u64,
    },
    /// The host has not so much memory.
    #[error("no memory for {size:#x} bytes of the guest from {gpa:#x} on: {source}")]
    NoMemory {
        /// First byte.
        gpa: u64,
        /// Number of bytes.
        size: u64,
        /// The error of the call.
        source: io::Error,
    },
    /// The VMM has touched memory that must be empty.
    #[error("the VMM has touched its memory at {hva:#x} before any of it came")]
    Touched {
        /// First byte of the page.
        hva: u64,
    },
    /// Faults are not reported any more where they were: no page must come.
    #[error("{size:#x} bytes at {hva:#x} are guarded no more: UFFDIO_REGISTER: {source}")]
    Unguarded {
        /// First byte.
        hva: u64,
        /// Number of bytes.
        size: u64,
        /// The error of the call.
        source: io::Error,
    },
    /// The page tables of the VMM cannot be read.
    #[error(transparent)]
    Pagemap(#[from] PagemapError),
    /// The fault thread, or the thread that allocates, has ended.
    #[error("the page path has ended")]
    Ended,
}

/// Allocates memory for these ranges of 4 KiB pages, where there is a plot, and makes it ready to be received into:
/// landings and plots are in the order of the layout. `huge_pages`: in huge ones where they cost no more. Returns for how
/// many bytes that is done.
///
/// # Errors
/// [`PreallocateError`].
pub fn preallocate(
    layout: &MemoryLayout,
    targets: &[Option<PreallocateTarget>],
    held: &[PageRange],
    huge_pages: bool,
) -> (Vec<Option<ReceiveMapping>>, Result<u64, PreallocateError>) {
    let mut regions: Vec<_> = targets.iter().map(|target| target.as_ref().map(PreparedRegion::new)).collect();
    let allocated = allocate(layout, &mut regions, held, HugePagePolicy::new(huge_pages));
    (regions.into_iter().map(|region| region?.receive_mapping).collect(), allocated)
}

fn allocate(
    layout: &MemoryLayout,
    regions: &mut [Option<PreparedRegion<'_>>],
    held: &[PageRange],
    mut policy: HugePagePolicy,
) -> Result<u64, PreallocateError> {
    let pieces = layout.in_pages_of(PAGE_SIZE);
    let (mut bytes, mut joined) = (0, 0);
    for range in held {
        let PageRange { region, page, count } = *range;
        if !pieces.contains(region, page, count) {
            return Err(PreallocateError::OutsideLayout { region, page, count });
        }
        let Some(Some(prepared)) = regions.get_mut(region as usize) else { continue };
        let (mut at, end) = (page * PAGE_SIZE, (page + count) * PAGE_SIZE);
        while at < end {
            let before = (prepared.target.file.offset + at).next_multiple_of(HUGE_PAGE_SIZE)
                - (prepared.target.file.offset + at);
            let blocks = if before == 0 { ((end - at) / HUGE_PAGE_SIZE).min(policy.blocks()) } else { 0 };
            let size = match (before, blocks) {
                (0, 0) => end - at,
                (0, _) => blocks * HUGE_PAGE_SIZE,
                _ => before.min(end - at),
            };
            let (began, huge) = (thread_time(), blocks > 0 && policy.is_huge());
            if huge && prepared.join(at, size)? {
                joined += size;
            }
            prepared.fill(at, size).map_err(|source| {
                let gpa = pieces.regions()[region as usize].gpa.0 + at;
                PreallocateError::NoMemory { gpa, size, source }
            })?;
            if blocks > 0 {
                policy.took(huge, blocks, thread_time().saturating_sub(began));
            }
            at += size;
            bytes += size;
        }
    }
    tracing::info!(bytes, huge = joined, "pager.ready");
    Ok(bytes)
}

impl<'a> PreparedRegion<'a> {
    fn new(target: &'a PreallocateTarget) -> Self {
        let receive_mapping = ReceiveMapping::new(&target.file, target.size);
        let receive_mapping =
            receive_mapping.inspect_err(|error| tracing::info!(%error, hva = target.hva.0, "pager.no_landing")).ok();
        let mapped = Pagemap::open(target.vmm_pid, target.hva, PAGE_SIZE).ok();
        Self { target, receive_mapping, mapped }
    }

    /// Puts huge pages under a range where the kernel can. It refuses wherever a userfaultfd reports missing pages, so
    /// the range is unregistered for a moment. The VMM would see pages that it has mapped, so it must have none. Returns whether
    /// all of it is of huge pages.
    fn join(&self, at: u64, size: u64) -> Result<bool, PreallocateError> {
        let (Some(receive_mapping), Some(mapped)) = (&self.receive_mapping, &self.mapped) else { return Ok(false) };
        let PreallocateTarget { uffd, .. } = self.target;
        // The kernel looks at the page behind as well (collapse_file() in mm/khugepaged.c, Linux 6.18).
        let (hva, around) = (Hva(self.target.hva.0 + at), (size + PAGE_SIZE).min(self.target.size - at));
        let joined = uffd.unregister(hva, around).and_then(|()| receive_mapping.join(at / PAGE_SIZE, size / PAGE_SIZE));
        uffd.register_minor(hva, around).map_err(|source| PreallocateError::Unguarded {
            hva: hva.0,
            size: around,
            source,
        })?;
        if let Err(error) = &joined {
            tracing::debug!(%error, hva = hva.0, size, "pager.no_huge_pages");
        }
        let touched = mapped.first_mapped(at / PAGE_SIZE, around / PAGE_SIZE)?;
        touched.map_or(Ok(joined.is_ok()), |page| {
            Err(PreallocateError::Touched { hva: self.target.hva.0 + page * PAGE_SIZE })
        })
    }

    /// Allocates a range, and makes it ready where it can.
    fn fill(&mut self, at: u64, size: u64) -> io::Result<()> {
        reserve(&self.target.file, at, size)?;
        if let Some(Err(error)) = self
            .receive_mapping
            .as_mut()
            .map(|receive_mapping| receive_mapping.prepare(at / PAGE_SIZE, size / PAGE_SIZE))
        {
            tracing::info!(%error, hva = self.target.hva.0, "pager.no_landing");
            self.receive_mapping = None;
        }
        Ok(())
    }
}

/// Reserves memory by fallocate(2); the error names the shortage.
fn reserve(file: &AttachedFile, at: u64, size: u64) -> io::Result<()> {
    Ok(retry_on_intr(|| fallocate(&file.fd, FallocateFlags::empty(), file.offset + at, size))?)
}

#[cfg(test)]
mod tests;
