//! Memory of a destination's files made ready before the blackout: reserved, filled with zeros and mapped.
//!
//! In huge pages where that costs no more than in small ones, which depends on the host: blocks may be at hand, or have
//! to be made by moving what else lies there, and a host that is a virtual machine itself may have to ask for them.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use tonic::Status;

use crate::destination::memory::receive_mapping::{HUGE, Landing};
use crate::lane::PAGE;
use crate::layout::{Hva, Layout};
use crate::proto::PageRange;
use crate::sched::cpu_time::thread_time;
use crate::source::memory::Pagemap;
use crate::sys::userfaultfd::Userfaultfd;
use crate::vmm::attached_memory::AttachedFile;

/// The file of a region to which pages are written, and where the VMM has it mapped.
#[derive(Debug)]
pub struct Plot {
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
struct Site<'a> {
    plot: &'a Plot,
    /// Where pages can be received in place.
    landing: Option<Landing>,
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
pub fn make_ready(
    layout: &Layout,
    plots: &[Option<Plot>],
    held: &[PageRange],
    huge_pages: bool,
) -> (Vec<Option<Landing>>, Result<u64, Status>) {
    let mut sites: Vec<_> = plots.iter().map(|plot| plot.as_ref().map(Site::new)).collect();
    let allocated = allocate(layout, &mut sites, held, Sizes::new(huge_pages));
    (sites.into_iter().map(|site| site?.landing).collect(), allocated)
}

fn allocate(
    layout: &Layout,
    sites: &mut [Option<Site<'_>>],
    held: &[PageRange],
    mut sizes: Sizes,
) -> Result<u64, Status> {
    let pieces = layout.in_pages_of(PAGE);
    let (mut bytes, mut joined) = (0, 0);
    for range in held {
        let PageRange { region, page, count } = *range;
        if !pieces.contains(region, page, count) {
            return Err(Status::invalid_argument(format!("held: region {region}, pages {page} + {count} of 4 KiB")));
        }
        let Some(Some(site)) = sites.get_mut(region as usize) else { continue };
        let (mut at, end) = (page * PAGE, (page + count) * PAGE);
        while at < end {
            let before = (site.plot.file.offset + at).next_multiple_of(HUGE) - (site.plot.file.offset + at);
            let blocks = if before == 0 { ((end - at) / HUGE).min(sizes.blocks()) } else { 0 };
            let size = match (before, blocks) {
                (0, 0) => end - at,
                (0, _) => blocks * HUGE,
                _ => before.min(end - at),
            };
            let (began, huge) = (thread_time(), blocks > 0 && sizes.is_huge());
            if huge && site.join(at, size)? {
                joined += size;
            }
            site.fill(at, size).map_err(|error| {
                let gpa = pieces.regions()[region as usize].gpa.0 + at;
                Status::resource_exhausted(format!(
                    "no memory for {size:#x} bytes of the guest from {gpa:#x} on: {error}"
                ))
            })?;
            if blocks > 0 {
                sizes.took(huge, blocks, thread_time().saturating_sub(began));
            }
            at += size;
            bytes += size;
        }
    }
    tracing::info!(bytes, huge = joined, "pager.ready");
    Ok(bytes)
}

impl<'a> Site<'a> {
    fn new(plot: &'a Plot) -> Self {
        let landing = Landing::new(&plot.file, plot.size);
        let landing = landing.inspect_err(|error| tracing::info!(%error, hva = plot.hva.0, "pager.no_landing")).ok();
        let mapped = Pagemap::open(plot.vmm_pid, plot.hva, PAGE).ok();
        Self { plot, landing, mapped }
    }

    /// Puts huge pages under a range where the kernel can. It refuses wherever a userfaultfd would be told of what the file
    /// lacks, so for a moment nobody is. What the VMM has mapped then would be seen as it comes, so it must have nothing.
    /// Returns whether all of it is of huge pages.
    fn join(&self, at: u64, size: u64) -> Result<bool, Status> {
        let (Some(landing), Some(mapped)) = (&self.landing, &self.mapped) else { return Ok(false) };
        let Plot { uffd, .. } = self.plot;
        // The kernel looks at the page behind as well (collapse_file() in mm/khugepaged.c, Linux 6.18).
        let (hva, around) = (Hva(self.plot.hva.0 + at), (size + PAGE).min(self.plot.size - at));
        let joined = uffd.unregister(hva, around).and_then(|()| landing.join(at / PAGE, size / PAGE));
        uffd.register_minor(hva, around).map_err(|error| {
            Status::internal(format!("{around:#x} bytes at {:#x} are guarded no more: UFFDIO_REGISTER: {error}", hva.0))
        })?;
        if let Err(error) = &joined {
            tracing::debug!(%error, hva = hva.0, size, "pager.no_huge_pages");
        }
        let touched =
            mapped.first_mapped(at / PAGE, around / PAGE).map_err(|error| Status::internal(error.to_string()))?;
        touched.map_or(Ok(joined.is_ok()), |page| {
            let hva = self.plot.hva.0 + page * PAGE;
            Err(Status::failed_precondition(format!(
                "the VMM has touched its memory at {hva:#x} before any of it came"
            )))
        })
    }

    /// Allocates a range, and makes it ready where it can.
    fn fill(&mut self, at: u64, size: u64) -> io::Result<()> {
        reserve(&self.plot.file, at, size)?;
        if let Some(Err(error)) = self.landing.as_mut().map(|landing| landing.prepare(at / PAGE, size / PAGE)) {
            tracing::info!(%error, hva = self.plot.hva.0, "pager.no_landing");
            self.landing = None;
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

/// Blocks that are made ready by one step: few, since a step whose blocks the host has to find first may take ten times as long.
const MOST_AT_ONCE: u64 = 4;
/// After the first step in huge pages that was dearer, so many blocks are made of small ones.
const FIRST_PAUSE: u64 = 4;
/// Each further time so many times more.
const LONGER: u64 = 4;

/// Of which pages the next blocks of 2 MiB are made: the first of small ones, to know their cost, then of huge ones for as long
/// as those cost no more; where they do, now and then one of them, ever more seldom.
#[derive(Debug)]
struct Sizes {
    /// What a block of small pages cost last.
    small: Duration,
    /// Blocks to be made of small pages before the next huge one.
    pause: u64,
    next_pause: u64,
    /// Blocks of huge pages at once.
    at_once: u64,
}

impl Sizes {
    fn new(huge_pages: bool) -> Self {
        let pause = if huge_pages { 1 } else { u64::MAX };
        Self { small: Duration::ZERO, pause, next_pause: FIRST_PAUSE, at_once: 1 }
    }

    fn is_huge(&self) -> bool {
        self.pause == 0
    }

    /// At most so many are next.
    fn blocks(&self) -> u64 {
        if self.is_huge() { self.at_once } else { self.pause.min(MOST_AT_ONCE) }
    }

    /// So many blocks were made ready, in so much processor's time.
    fn took(&mut self, huge: bool, blocks: u64, time: Duration) {
        let each = Duration::from_nanos(time.as_nanos() as u64 / blocks.max(1));
        if !huge {
            self.small = each;
            self.pause = self.pause.saturating_sub(blocks);
        } else if each <= self.small {
            self.at_once = (self.at_once * 2).min(MOST_AT_ONCE);
            self.next_pause = FIRST_PAUSE;
        } else {
            self.at_once = 1;
            self.pause = self.next_pause;
            self.next_pause = self.next_pause.saturating_mul(LONGER);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::proto;
    use crate::sys::userfaultfd::{Event, feature, memfd, probe};

    /// How many of so many blocks were made of huge pages, and the steps: of huge ones?, blocks.
    fn course(blocks: u64, small: u64, huge: impl Fn(u64) -> u64) -> (u64, Vec<(bool, u64)>) {
        let (mut sizes, mut done, mut of_huge, mut steps) = (Sizes::new(true), 0, 0, vec![]);
        while done < blocks {
            let (is_huge, next) = (sizes.is_huge(), sizes.blocks().min(blocks - done));
            let each = if is_huge { huge(done) } else { small };
            sizes.took(is_huge, next, Duration::from_micros(each * next));
            steps.push((is_huge, next));
            done += next;
            of_huge += if is_huge { next } else { 0 };
        }
        (of_huge, steps)
    }

    #[test]
    fn huge_pages_that_cost_less_are_all_but_the_first_block() {
        let (of_huge, steps) = course(64, 700, |_| 300);
        assert_eq!(of_huge, 63);
        assert_eq!(steps[..6], [(false, 1), (true, 1), (true, 2), (true, 4), (true, 4), (true, 4)]);
    }

    #[test]
    fn huge_pages_that_cost_more_are_tried_ever_more_seldom() {
        let (of_huge, steps) = course(512 * 1024, 700, |_| 6000);
        assert!(of_huge < 12, "{of_huge}");
        assert_eq!(steps[..5], [(false, 1), (true, 1), (false, 4), (true, 1), (false, 4)]);
    }

    #[test]
    fn huge_pages_that_become_cheap_are_found() {
        let (of_huge, _) = course(1024, 700, |done| if done < 40 { 6000 } else { 300 });
        assert!(of_huge > 900, "{of_huge}");
    }

    #[test]
    fn none_are_huge_where_that_is_not_wanted() {
        let mut sizes = Sizes::new(false);
        for _ in 0..1000 {
            assert!(!sizes.is_huge());
            sizes.took(false, sizes.blocks(), Duration::from_micros(1));
        }
    }

    proptest! {
        #[test]
        fn every_step_goes_on(small in 0u64..10_000, costs in proptest::collection::vec(0u64..20_000, 1..50)) {
            let (of_huge, steps) = course(2048, small, |done| costs[done as usize % costs.len()]);
            prop_assert!(steps.iter().all(|(_, blocks)| (1..=MOST_AT_ONCE).contains(blocks)));
            prop_assert_eq!(steps.iter().map(|(_, blocks)| blocks).sum::<u64>(), 2048);
            prop_assert!(of_huge < 2048);
        }
    }

    /// Memory of so many blocks in a file, `skew` bytes before a block begins; what a VMM, which is this process, has mapped.
    fn plot(blocks: u64, skew: u64) -> Option<(Layout, Plot)> {
        let features = feature::MISSING_SHMEM | feature::MINOR_SHMEM;
        if let Err(reason) = probe(features) {
            eprintln!("skipped: {reason}");
            return None;
        }
        let size = blocks * HUGE;
        let file = AttachedFile { fd: memfd("guest", size + HUGE).unwrap(), offset: HUGE - skew };
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
        let region = proto::MemoryRegion { gpa: 0, size, page_size: PAGE, backing };
        let layout = Layout::try_from(&proto::MemoryLayout { regions: vec![region] }).unwrap();
        Some((layout, Plot { file, uffd, vmm_pid: std::process::id(), hva, size }))
    }

    /// Bytes of this process's mapping of a landing that are mapped by huge pages.
    fn in_huge_pages(landing: &Landing) -> u64 {
        let at = format!("{:x}-", landing.at(0, 1).unwrap() as u64);
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mapping = smaps.lines().skip_while(|line| !line.starts_with(&at));
        let line = mapping.take(40).find(|line| line.starts_with("ShmemPmdMapped:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    #[test]
    fn blocks_are_joined_and_every_touch_is_still_told() {
        for skew in [0, 5 * PAGE] {
            let Some((_, plot)) = plot(4, skew) else { return };
            let mut site = Site::new(&plot);
            let (at, size) = (skew, 2 * HUGE);
            let joined = site.join(at, size).unwrap();
            site.fill(0, plot.size).unwrap();
            let landing = site.landing.as_ref().unwrap();
            if joined {
                assert_eq!(in_huge_pages(landing), size, "{skew}");
            } else {
                eprintln!("no huge page is to be had here");
            }
            let place = landing.at(0, plot.size / PAGE).unwrap();
            // SAFETY: a page of the landing, which is there.
            unsafe { place.wrapping_add((at + PAGE) as usize).write_bytes(7, PAGE as usize) };
            for page in [0, at / PAGE + 1, (at + size) / PAGE, plot.size / PAGE - 1] {
                let address = plot.hva.0 + page * PAGE;
                // SAFETY: a byte of the VMM's mapping, which waits for its page.
                let touch = std::thread::spawn(move || unsafe { (address as *const u8).read_volatile() });
                let told = std::iter::repeat_with(|| plot.uffd.read_events().unwrap())
                    .find(|events| !events.is_empty())
                    .unwrap();
                assert!(
                    matches!(told[..], [Event::Fault { at, minor: true, .. }] if at.0 / PAGE == address / PAGE),
                    "{told:?}"
                );
                assert_eq!(plot.uffd.map(Hva(address), PAGE).stop, None);
                assert_eq!(touch.join().unwrap(), if page == at / PAGE + 1 { 7 } else { 0 });
            }
        }
    }

    #[test]
    fn memory_that_the_vmm_has_touched_is_refused_where_it_would_be_seen() {
        for (huge_pages, page, refused) in [(true, 2 * HUGE, true), (true, HUGE / 2, false), (false, 2 * HUGE, false)] {
            let Some((layout, plot)) = plot(4, 0) else { return };
            plot.uffd.unregister(plot.hva, plot.size).unwrap();
            // Of the first block, which is of small pages, or behind the second. SAFETY: a byte of the VMM's mapping.
            unsafe { ((plot.hva.0 + page) as *const u8).read_volatile() };
            plot.uffd.register_minor(plot.hva, plot.size).unwrap();
            let held = [PageRange { region: 0, page: 0, count: plot.size / PAGE }];
            let address = format!("{:#x}", plot.hva.0 + page);
            let (landings, ready) = make_ready(&layout, &[Some(plot)], &held, huge_pages);
            match ready {
                Ok(bytes) => assert_eq!((bytes, refused), (4 * HUGE, false)),
                Err(status) => {
                    assert!(refused && status.message().contains(&address), "{status}");
                    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
                }
            }
            assert_eq!(landings.len(), 1);
        }
    }
}
