//! Pages that a lane has claimed, on their way to where the VMM finds them: INSTALLING, so that until the claim is settled
//! nobody else asks for them, installs them or changes their state, and the lock need not be held.
//!
//! ```text
//!  of a file:  received or written ──▶ PRESENT ──▶ CONTINUE       who touches one in between finds it in the file
//!  any other:  COPY ──▶ PRESENT
//! ```
//! Bytes in a file are written over once more where a page is still INSTALLING when a pager dies, so it is PRESENT before
//! the guest can see it, and write to it. COPY does both at once, and harms no page that is there.

use std::sync::Arc;
use std::time::Instant;

use rustix::io::{Errno, pwrite};

use crate::destination::memory::receive_mapping::ReceiveMapping;
use crate::destination::memory::vmm_mappings::{Mapping, VmmMappings};
use crate::lane::MAX_FRAME_PAGES;
use crate::layout::Hva;
use crate::layout::PAGE_SIZE;
use crate::layout::address_map::PageIndex;
use crate::layout::page_run::Arrival;
use crate::sys::iovecs::ReceivePlaces;
use crate::sys::memfd::punch_hole;
use crate::sys::userfaultfd::{Stop, Userfaultfd};
use crate::vmm::attached_memory::AttachedFile;

/// Pages that are installed by one call: who waits for one of them is woken behind it.
const INSTALL_BATCH: u64 = 16;

/// The frame that the file has for a page is bad.
pub const BAD_FRAME: Stop = Stop::Refused(libc::EIO);

/// How contents come to where the VMM finds them.
#[derive(Debug, Clone)]
pub enum InstallMethod {
    /// They are received into their file, by a mapping that stays meanwhile, in which the first has this number.
    Received(Arc<ReceiveMapping>, u64),
    /// They are written to a region's file, in which the first has this number; where there is a landing, by its mapping.
    Written(Arc<AttachedFile>, u64, Option<Arc<ReceiveMapping>>),
    /// They are copied into memory with these mappings.
    Copied(VmmMappings),
}

/// At most [`MAX_FRAME_PAGES`] pages of 4 KiB, of which those are claimed that were wanted.
#[derive(Debug)]
pub struct Claim {
    first: PageIndex,
    count: u64,
    /// Bit `n`: the `n`-th page is claimed, and nothing has come of it.
    wanted: u64,
    /// It is in its file, or copied.
    arrived: u64,
    /// It was in its file, whose frame went bad before it was mapped.
    lost: u64,
    arrival: Arrival,
    uffd: Arc<Userfaultfd>,
    /// Of the first page.
    hva: Hva,
    method: InstallMethod,
    began: Instant,
}

const _: () = assert!(MAX_FRAME_PAGES <= u64::BITS as u64);

impl Claim {
    /// Of `count` pages from `first` on, which is at `hva`; `take` claims each, or says that it is not wanted.
    pub fn new(
        (first, count, hva): (PageIndex, u64, Hva),
        (uffd, method): (Arc<Userfaultfd>, InstallMethod),
        arrival: Arrival,
        mut take: impl FnMut(PageIndex) -> bool,
    ) -> Self {
        let wanted = (0..count).fold(0, |wanted, n| wanted | u64::from(take(PageIndex(first.0 + n))) << n);
        Self { first, count, wanted, arrived: 0, lost: 0, arrival, uffd, hva, method, began: Instant::now() }
    }

    /// Adds a place for each page of a claim that is received in place: in the receive mapping if the page is claimed,
    /// otherwise in `elsewhere`, which has room for all. Returns whether there is a place for each.
    #[must_use]
    pub fn add_places<'a>(&'a self, elsewhere: &'a mut [u8], places: &mut ReceivePlaces<'a>) -> bool {
        let InstallMethod::Received(receive_mapping, first) = &self.method else { return false };
        let Some(pages) = receive_mapping.ready(*first, self.count) else { return false };
        for (n, elsewhere) in (0..self.count).zip(elsewhere.chunks_exact_mut(PAGE_SIZE as usize)) {
            if self.wanted >> n & 1 == 1 {
                places.push_pages(pages.part(n, 1));
            } else {
                places.push(elsewhere);
            }
        }
        true
    }

    /// How its contents come.
    #[cfg(test)]
    pub fn method(&self) -> &InstallMethod {
        &self.method
    }

    /// Whether its pages are in their file before they are mapped.
    pub fn is_by_file(&self) -> bool {
        !matches!(self.method, InstallMethod::Copied(_))
    }

    /// What is to be in a file is there: received, or written now out of the `contents` of all the pages. After a stop the
    /// first [`Self::handled`] are, or are not wanted.
    pub fn write(&mut self, contents: &[u8]) -> Option<Stop> {
        let (file, first, receive_mapping) = match &self.method {
            InstallMethod::Copied(_) => return None,
            InstallMethod::Received(..) => {
                self.arrived = std::mem::take(&mut self.wanted);
                return None;
            }
            InstallMethod::Written(file, first, receive_mapping) => (file.clone(), *first, receive_mapping.clone()),
        };
        while let Some((n, count)) = first_run(self.wanted) {
            let (page, bytes) = (first + n, part(contents, n, count));
            let landed = receive_mapping.as_ref().is_some_and(|receive_mapping| receive_mapping.write(page, bytes));
            if !landed && let Err(stop) = write(&file, file.offset + page * PAGE_SIZE, bytes) {
                return Some(stop);
            }
            self.note_arrived(n, count);
        }
        None
    }

    /// Maps what is in its file, or copies the `contents`, and wakes who waits. After a stop the first [`Self::handled`] need
    /// nothing more: of a file, what cannot be mapped now is when it is touched.
    pub fn install(&mut self, contents: &[u8]) -> Option<Stop> {
        self.began = Instant::now();
        if self.is_by_file() { self.map() } else { self.copy(contents) }
    }

    fn map(&mut self) -> Option<Stop> {
        let (mut unmapped, mut first_stop) = (self.arrived, None);
        while let Some((n, count)) = first_batch(unmapped) {
            let progress = self.uffd.map(self.address(n), count * PAGE_SIZE);
            let mut reached = progress.done / PAGE_SIZE;
            if progress.stop == Some(BAD_FRAME) {
                self.lost |= 1 << (n + reached);
                reached += 1;
            } else if let Some(stop) = progress.stop {
                // Whoever waits for it tries again. EEXIST wakes nobody.
                let _ = self.uffd.wake(self.address(n + reached), PAGE_SIZE);
                reached += 1;
                first_stop = first_stop.or(Some(stop).filter(|stop| !stop.passes()));
            }
            (n..n + reached).for_each(|n| unmapped &= !(1 << n));
        }
        first_stop
    }

    fn copy(&mut self, contents: &[u8]) -> Option<Stop> {
        while let Some((n, count)) = first_batch(self.wanted) {
            let progress = self.uffd.copy(self.address(n), part(contents, n, count));
            let reached = progress.done / PAGE_SIZE;
            self.note_arrived(n, reached);
            match progress.stop {
                None => {}
                Some(Stop::AlreadyPresent) if self.is_mapped(n + reached) => {
                    // By a pager that died before it could say so. EEXIST wakes nobody.
                    let _ = self.uffd.wake(self.address(n + reached), PAGE_SIZE);
                    self.note_arrived(n + reached, 1);
                }
                Some(Stop::AlreadyPresent) => return Some(Stop::Refused(libc::EEXIST)),
                stop => return stop,
            }
        }
        None
    }

    /// Proof that an `EEXIST` of COPY is a page that the guest can read.
    fn is_mapped(&self, n: u64) -> bool {
        let InstallMethod::Copied(mappings) = self.method else { return false };
        mappings.at(self.address(n), PAGE_SIZE) == Mapping::Page
    }

    fn note_arrived(&mut self, n: u64, count: u64) {
        for n in n..n + count {
            self.wanted &= !(1 << n);
            self.arrived |= 1 << n;
        }
    }

    fn address(&self, n: u64) -> Hva {
        Hva(self.hva.0 + n * PAGE_SIZE)
    }

    /// So many of the first pages need nothing more.
    pub fn handled(&self) -> u64 {
        u64::from(self.wanted.trailing_zeros()).min(self.count)
    }

    /// What is in its file, or copied, as half-open runs.
    pub fn arrived(&self) -> impl Iterator<Item = (PageIndex, PageIndex)> + '_ {
        let mut rest = self.arrived;
        std::iter::from_fn(move || {
            let (n, count) = first_run(rest)?;
            (n..n + count).for_each(|n| rest &= !(1 << n));
            Some((PageIndex(self.first.0 + n), PageIndex(self.first.0 + n + count)))
        })
    }

    /// Pages that arrived and are nowhere any more.
    pub fn lost(&self) -> impl Iterator<Item = PageIndex> + '_ {
        (0..self.count).filter(|n| self.lost >> n & 1 == 1).map(|n| PageIndex(self.first.0 + n))
    }

    /// Takes back what was received in place of its pages, the first `received` bytes of all: they are copied to `contents`,
    /// and each page with a bad frame gets another. How many did; `None`: some of the bytes are lost.
    pub fn withdraw(&self, received: usize, contents: &mut [u8]) -> Option<usize> {
        let InstallMethod::Received(receive_mapping, first) = &self.method else { return None };
        let mut replaced = 0;
        let pages = contents.chunks_exact_mut(PAGE_SIZE as usize).take(self.count as usize).enumerate();
        for (n, contents) in pages.filter(|(n, _)| self.wanted >> n & 1 == 1) {
            let page = first + n as u64;
            if n * PAGE_SIZE as usize >= received {
                replaced += usize::from(receive_mapping.replace_bad_frame(page));
            } else if !receive_mapping.read(page, contents) {
                return None;
            }
        }
        Some(replaced)
    }

    /// What is not.
    pub fn missing(&self) -> impl Iterator<Item = PageIndex> + '_ {
        (0..self.count).filter(|n| self.wanted >> n & 1 == 1).map(|n| PageIndex(self.first.0 + n))
    }

    /// Of all its pages, wanted or not: half-open.
    pub fn range(&self) -> (PageIndex, PageIndex) {
        (self.first, PageIndex(self.first.0 + self.count))
    }

    /// How it comes.
    pub fn arrival(&self) -> Arrival {
        self.arrival
    }

    /// Whoever faulted on a page that is installed now, and was read before then, was woken.
    pub fn began(&self) -> Instant {
        self.began
    }
}

/// The bytes of `count` pages from the `n`-th on.
fn part(contents: &[u8], n: u64, count: u64) -> &[u8] {
    &contents[(n * PAGE_SIZE) as usize..][..(count * PAGE_SIZE) as usize]
}

/// The begin of the first run, at most [`INSTALL_BATCH`].
fn first_batch(bits: u64) -> Option<(u64, u64)> {
    first_run(bits).map(|(n, count)| (n, count.min(INSTALL_BATCH)))
}

/// Number and length of the first run of ones.
fn first_run(bits: u64) -> Option<(u64, u64)> {
    let skipped = bits.trailing_zeros();
    let run = bits.checked_shr(skipped)?.trailing_ones();
    Some((skipped.into(), run.into()))
}

/// Nobody sees what is written before it is mapped. A page with a bad frame gets another.
fn write(file: &AttachedFile, mut at: u64, mut bytes: &[u8]) -> Result<(), Stop> {
    let mut replaced = None;
    while !bytes.is_empty() {
        match pwrite(&file.fd, bytes, at) {
            Ok(n) => (bytes, at) = (&bytes[n..], at + n as u64),
            Err(Errno::INTR) => {}
            Err(Errno::NOMEM | Errno::NOSPC) => return Err(Stop::NoMemory),
            // All before the bad page was written.
            Err(Errno::IO) if replaced.replace(at) != Some(at) => {
                tracing::warn!(offset = at, "pager.bad_frame_replaced");
                punch_hole(&file.fd, at, PAGE_SIZE).map_err(|_| BAD_FRAME)?;
            }
            Err(error) => return Err(Stop::Refused(error.raw_os_error())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
