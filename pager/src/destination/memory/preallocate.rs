//! Memory of a destination's files made ready before the blackout: reserved, filled with zeros and mapped.
//!
//! In huge pages where that costs no more than in small ones, which depends on the host: blocks may be at hand, or have
//! to be made by moving what else lies there, and a host that is a virtual machine itself may have to ask for them.

use std::io;
use std::os::fd::AsRawFd;

use tonic::Status;

use crate::destination::memory::huge_page_policy::HugePagePolicy;
use crate::destination::memory::receive_mapping::ReceiveMapping;
use crate::layout::{HUGE_PAGE_SIZE, Hva, MemoryLayout, PAGE_SIZE};
use crate::proto::PageRange;
use crate::sched::cpu_time::thread_time;
use crate::sys::pagemap::Pagemap;
use crate::sys::userfaultfd::Userfaultfd;
use crate::vmm::attached_memory::AttachedFile;

/// The file of a region to which pages are written, and where the VMM has it mapped.
#[derive(Debug)]
pub struct PreallocateTarget {
    /// What the region's bytes are in.
    pub file: AttachedFile,
    /// With what the mapping is registered.
    pub uffd: Userfaultfd,
    /// Whose mapping it is.
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
    /// Tells what the VMM has mapped.
    mapped: Option<Pagemap>,
}

/// Allocates memory for these ranges of 4 KiB pages, where there is a plot, and makes it ready to be received into:
/// landings and plots are in the order of the layout. `huge_pages`: in huge ones where they cost no more. Returns for how
/// many bytes that is done.
///
/// # Errors
/// `INVALID_ARGUMENT`: outside the layout. `RESOURCE_EXHAUSTED`: this host has not so much memory.
/// `FAILED_PRECONDITION`: the VMM has touched its memory. `INTERNAL`: faults are not told of any more where they were; no
/// page must come.
pub fn preallocate(
    layout: &MemoryLayout,
    targets: &[Option<PreallocateTarget>],
    held: &[PageRange],
    huge_pages: bool,
) -> (Vec<Option<ReceiveMapping>>, Result<u64, Status>) {
    let mut regions: Vec<_> = targets.iter().map(|target| target.as_ref().map(PreparedRegion::new)).collect();
    let allocated = allocate(layout, &mut regions, held, HugePagePolicy::new(huge_pages));
    (regions.into_iter().map(|region| region?.receive_mapping).collect(), allocated)
}

fn allocate(
    layout: &MemoryLayout,
    regions: &mut [Option<PreparedRegion<'_>>],
    held: &[PageRange],
    mut policy: HugePagePolicy,
) -> Result<u64, Status> {
    let pieces = layout.in_pages_of(PAGE_SIZE);
    let (mut bytes, mut joined) = (0, 0);
    for range in held {
        let PageRange { region, page, count } = *range;
        if !pieces.contains(region, page, count) {
            return Err(Status::invalid_argument(format!("held: region {region}, pages {page} + {count} of 4 KiB")));
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
            prepared.fill(at, size).map_err(|error| {
                let gpa = pieces.regions()[region as usize].gpa.0 + at;
                Status::resource_exhausted(format!(
                    "no memory for {size:#x} bytes of the guest from {gpa:#x} on: {error}"
                ))
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

    /// Puts huge pages under a range where the kernel can. It refuses wherever a userfaultfd would be told of what the file
    /// lacks, so for a moment nobody is. What the VMM has mapped then would be seen as it comes, so it must have nothing.
    /// Returns whether all of it is of huge pages.
    fn join(&self, at: u64, size: u64) -> Result<bool, Status> {
        let (Some(receive_mapping), Some(mapped)) = (&self.receive_mapping, &self.mapped) else { return Ok(false) };
        let PreallocateTarget { uffd, .. } = self.target;
        // The kernel looks at the page behind as well (collapse_file() in mm/khugepaged.c, Linux 6.18).
        let (hva, around) = (Hva(self.target.hva.0 + at), (size + PAGE_SIZE).min(self.target.size - at));
        let joined = uffd.unregister(hva, around).and_then(|()| receive_mapping.join(at / PAGE_SIZE, size / PAGE_SIZE));
        uffd.register_minor(hva, around).map_err(|error| {
            Status::internal(format!("{around:#x} bytes at {:#x} are guarded no more: UFFDIO_REGISTER: {error}", hva.0))
        })?;
        if let Err(error) = &joined {
            tracing::debug!(%error, hva = hva.0, size, "pager.no_huge_pages");
        }
        let touched = mapped
            .first_mapped(at / PAGE_SIZE, around / PAGE_SIZE)
            .map_err(|error| Status::internal(error.to_string()))?;
        touched.map_or(Ok(joined.is_ok()), |page| {
            let hva = self.target.hva.0 + page * PAGE_SIZE;
            Err(Status::failed_precondition(format!(
                "the VMM has touched its memory at {hva:#x} before any of it came"
            )))
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

/// fallocate(2), which says what is lacking.
fn reserve(file: &AttachedFile, at: u64, size: u64) -> io::Result<()> {
    let (fd, from) = (file.fd.as_raw_fd(), file.offset + at);
    loop {
        // SAFETY: no memory is passed.
        if unsafe { libc::fallocate(fd, 0, from as libc::off_t, size as libc::off_t) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto;
    use crate::sys::memfd::memfd;
    use crate::sys::userfaultfd::{UffdEvent, feature, probe};

    /// Memory of so many blocks in a file, `skew` bytes before a block begins; what a VMM, which is this process, has mapped.
    fn target(blocks: u64, skew: u64) -> Option<(MemoryLayout, PreallocateTarget)> {
        let features = feature::MISSING_SHMEM | feature::MINOR_SHMEM;
        if let Err(reason) = probe(features) {
            eprintln!("skipped: {reason}");
            return None;
        }
        let size = blocks * HUGE_PAGE_SIZE;
        let file = AttachedFile { fd: memfd("guest", size + HUGE_PAGE_SIZE).unwrap(), offset: HUGE_PAGE_SIZE - skew };
        let (write, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a fresh mapping.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size as usize,
                write,
                flags,
                file.fd.as_raw_fd(),
                file.offset as libc::off_t,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        let uffd = Userfaultfd::create().unwrap();
        uffd.enable(features).unwrap();
        let hva = Hva(at as u64);
        uffd.register_minor(hva, size).unwrap();
        let backing = proto::Backing::Memfd.into();
        let region = proto::MemoryRegion { gpa: 0, size, page_size: PAGE_SIZE, backing };
        let layout = MemoryLayout::try_from(&proto::MemoryLayout { regions: vec![region] }).unwrap();
        Some((layout, PreallocateTarget { file, uffd, vmm_pid: std::process::id(), hva, size }))
    }

    /// Bytes of this process's mapping of a landing that are mapped by huge pages.
    fn in_huge_pages(receive_mapping: &ReceiveMapping) -> u64 {
        let at = format!("{:x}-", receive_mapping.at(0, 1).unwrap() as u64);
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mapping = smaps.lines().skip_while(|line| !line.starts_with(&at));
        let line = mapping.take(40).find(|line| line.starts_with("ShmemPmdMapped:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    #[test]
    fn blocks_are_joined_and_every_touch_is_still_told() {
        for skew in [0, 5 * PAGE_SIZE] {
            let Some((_, target)) = target(4, skew) else { return };
            let mut region = PreparedRegion::new(&target);
            let (at, size) = (skew, 2 * HUGE_PAGE_SIZE);
            let joined = region.join(at, size).unwrap();
            region.fill(0, target.size).unwrap();
            let receive_mapping = region.receive_mapping.as_ref().unwrap();
            if joined {
                assert_eq!(in_huge_pages(receive_mapping), size, "{skew}");
            } else {
                eprintln!("no huge page is to be had here");
            }
            let place = receive_mapping.at(0, target.size / PAGE_SIZE).unwrap();
            // SAFETY: a page of the landing, which is there.
            unsafe { place.wrapping_add((at + PAGE_SIZE) as usize).write_bytes(7, PAGE_SIZE as usize) };
            for page in [0, at / PAGE_SIZE + 1, (at + size) / PAGE_SIZE, target.size / PAGE_SIZE - 1] {
                let address = target.hva.0 + page * PAGE_SIZE;
                // SAFETY: a byte of the VMM's mapping, which waits for its page.
                let touch = std::thread::spawn(move || unsafe { (address as *const u8).read_volatile() });
                let told = std::iter::repeat_with(|| target.uffd.read_events().unwrap())
                    .find(|events| !events.is_empty())
                    .unwrap();
                assert!(
                    matches!(told[..], [UffdEvent::Fault { at, minor: true, .. }] if at.0 / PAGE_SIZE == address / PAGE_SIZE),
                    "{told:?}"
                );
                assert_eq!(target.uffd.map(Hva(address), PAGE_SIZE).stop, None);
                assert_eq!(touch.join().unwrap(), if page == at / PAGE_SIZE + 1 { 7 } else { 0 });
            }
        }
    }

    #[test]
    fn memory_that_the_vmm_has_touched_is_refused_where_it_would_be_seen() {
        for (huge_pages, page, refused) in
            [(true, 2 * HUGE_PAGE_SIZE, true), (true, HUGE_PAGE_SIZE / 2, false), (false, 2 * HUGE_PAGE_SIZE, false)]
        {
            let Some((layout, target)) = target(4, 0) else { return };
            target.uffd.unregister(target.hva, target.size).unwrap();
            // Of the first block, which is of small pages, or behind the second. SAFETY: a byte of the VMM's mapping.
            unsafe { ((target.hva.0 + page) as *const u8).read_volatile() };
            target.uffd.register_minor(target.hva, target.size).unwrap();
            let held = [PageRange { region: 0, page: 0, count: target.size / PAGE_SIZE }];
            let address = format!("{:#x}", target.hva.0 + page);
            let (receive_mappings, ready) = preallocate(&layout, &[Some(target)], &held, huge_pages);
            match ready {
                Ok(bytes) => assert_eq!((bytes, refused), (4 * HUGE_PAGE_SIZE, false)),
                Err(status) => {
                    assert!(refused && status.message().contains(&address), "{status}");
                    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
                }
            }
            assert_eq!(receive_mappings.len(), 1);
        }
    }
}
