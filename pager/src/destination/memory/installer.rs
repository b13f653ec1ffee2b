//! Puts arriving pages where the VMM finds them. A page's state is written before the ioctl; each ioctl wakes who waits on
//! what it installed; a range is split at every page that was not claimed.
//!
//! | region | installed by |
//! |---|---|
//! | memfd of 4 KiB pages | CONTINUE, when they are in the file: received or copied there, or written by `pwrite` |
//! | any other | COPY; a huge page is gathered from its pieces first |
//!
//! A huge page is claimed at its first piece of 4 KiB and installed when it has the last. Zeros are only written down:
//! the page is made when somebody touches it.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::destination::memory::claim::{BAD_FRAME, Claim, InstallMethod};
use crate::destination::memory::huge_page_staging::HugePageStaging;
use crate::destination::memory::preallocate::PreallocateTarget;
use crate::destination::memory::receive_mapping::ReceiveMapping;
use crate::destination::memory::vmm_mappings::{Mapping, VmmMappings};
use crate::destination::page_table::PageTable;
use crate::layout::Hva;
use crate::layout::PAGE_SIZE;
use crate::layout::address_map::{AddressMap, NumberedRegion, PageIndex};
use crate::layout::page_run::Arrival;
use crate::layout::page_run::{LaneKind, PageRun};
use crate::sys::fd_passing;
use crate::sys::memfd::punch_hole;
use crate::sys::userfaultfd::{Stop, Userfaultfd};
use crate::vmm::attached_memory::AttachedFile;

/// How far an install came.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Installed {
    /// Pages that are there now and were not before, as half-open runs.
    pub runs: Vec<(PageIndex, PageIndex)>,
    /// Why not further.
    pub stop: Option<Stop>,
}

/// What a region is on.
#[derive(Debug)]
pub struct RegionBacking {
    /// With what it is registered.
    pub uffd: Arc<Userfaultfd>,
    /// What is behind it, where the backing is a file.
    pub file: Option<AttachedFile>,
}

/// What is under a region.
#[derive(Debug)]
struct RegionState {
    uffd: Arc<Userfaultfd>,
    file: Option<Arc<AttachedFile>>,
    /// Pages are written to the file, and faults on what it holds are told of.
    by_file: bool,
    /// Where some of them can be received in place.
    receive_mapping: Option<Arc<ReceiveMapping>>,
}

/// How often a marker is tried over a page that the guest fills again in between.
const MARKER_TRIES: u32 = 8;

/// The VMM's memory, as ioctls reach it.
#[derive(Debug)]
pub struct Installer {
    address_map: AddressMap,
    mappings: VmmMappings,
    regions: Vec<RegionState>,
    /// Huge pages that have come in part.
    staged: HashMap<PageIndex, HugePageStaging>,
}

impl Installer {
    /// The userfaultfds act on the address space of process `vmm_pid`, in which `address_map` holds; `backings` in the order
    /// of the layout. `fresh`: no page has come yet.
    ///
    /// # Errors
    /// Faults on what a region's file holds cannot be told of, though an earlier pager wrote pages to it: a page of which it
    /// holds a part would pass for the page.
    pub fn new(address_map: AddressMap, backings: Vec<RegionBacking>, vmm_pid: u32, fresh: bool) -> io::Result<Self> {
        let mut regions = Vec::new();
        for (RegionBacking { uffd, file }, ((hva, size), region)) in
            backings.into_iter().zip(address_map.ranges().zip(address_map.numbering().regions()))
        {
            let wanted = region.pieces() == 1 && file.as_ref().is_some_and(|file| is_writable(&file.fd));
            let by_file = match wanted.then(|| uffd.register_minor(hva, size)) {
                None => false,
                Some(Ok(())) => true,
                Some(Err(error)) if fresh => {
                    tracing::info!(%error, hva = hva.0, "pager.no_minor_faults");
                    false
                }
                Some(Err(error)) => return Err(error),
            };
            regions.push(RegionState { uffd, file: file.map(Arc::new), by_file, receive_mapping: None });
        }
        Ok(Self { address_map, mappings: VmmMappings::new(vmm_pid), regions, staged: HashMap::new() })
    }

    /// Where the pages are.
    pub fn address_map(&self) -> &AddressMap {
        &self.address_map
    }

    /// With what a page is registered, its address and its size.
    fn place_of(&self, page: PageIndex) -> Option<(&Userfaultfd, Hva, u64)> {
        let region = self.address_map.numbering().region_of(page)?;
        let (hva, size) = self.address_map.address_of(page)?;
        Some((&self.regions.get(region.number as usize)?.uffd, hva, size))
    }

    /// Where memory can be allocated ahead, in the order of the layout. The mappings are those of process `vmm_pid`.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn targets(&self, vmm_pid: u32) -> io::Result<Vec<Option<PreallocateTarget>>> {
        let target = |(region, (hva, size)): (&RegionState, (Hva, u64))| {
            let file = region.file.as_ref().filter(|_| region.by_file)?;
            let parts = file.try_clone().and_then(|file| Ok((file, region.uffd.try_clone()?)));
            Some(parts.map(|(file, uffd)| PreallocateTarget { file, uffd, vmm_pid, hva, size }))
        };
        self.regions.iter().zip(self.address_map.ranges()).map(|region| target(region).transpose()).collect()
    }

    fn region(&self, number: u32) -> Option<NumberedRegion> {
        self.address_map.numbering().regions().get(number as usize).copied()
    }

    /// The file to which pages of a region are written, if they are.
    fn file_of(&self, region: &NumberedRegion) -> Option<&Arc<AttachedFile>> {
        self.regions.get(region.number as usize).filter(|region| region.by_file)?.file.as_ref()
    }

    /// Whether a page is written to its file.
    pub fn is_by_file(&self, page: PageIndex) -> bool {
        self.address_map.numbering().region_of(page).is_some_and(|region| self.file_of(region).is_some())
    }

    // ---- data ----

    /// Pages are received in place from now on, where there is a landing; in the order of the layout.
    pub fn set_receive_mappings(&mut self, receive_mappings: Vec<Option<ReceiveMapping>>) {
        for (region, receive_mapping) in self.regions.iter_mut().zip(receive_mappings) {
            region.receive_mapping = receive_mapping.map(Arc::new);
        }
    }

    /// Nothing is received in place any more.
    pub fn take_receive_mappings(&mut self) -> Vec<Arc<ReceiveMapping>> {
        self.regions.iter_mut().filter_map(|region| region.receive_mapping.take()).collect()
    }

    /// Whether pages can be received in place.
    pub fn can_receive_directly(&self, pages: PageRun) -> bool {
        let receive_mapping =
            self.regions.get(pages.region as usize).and_then(|region| region.receive_mapping.as_ref());
        receive_mapping.is_some_and(|receive_mapping| receive_mapping.ready(pages.page, pages.count).is_some())
    }

    /// Claims those of at most [`MAX_FRAME_PAGES`](crate::lane::MAX_FRAME_PAGES) pages that are wanted. `None`: they are pieces of huge
    /// pages.
    pub fn claim(&self, table: &mut PageTable, pages: PageRun, lane: LaneKind) -> Option<Claim> {
        let region = self.region(pages.region).filter(|region| region.pieces() == 1)?;
        let method = match self.file_of(&region) {
            Some(file) => {
                let receive_mapping =
                    self.regions.get(pages.region as usize).and_then(|region| region.receive_mapping.clone());
                InstallMethod::Written(file.clone(), pages.page, receive_mapping)
            }
            None => InstallMethod::Copied(self.mappings),
        };
        self.claim_by(method, table, pages, lane)
    }

    /// The same, where they are received in place. `None`: they cannot be, and nothing is claimed.
    pub fn claim_in_place(&self, table: &mut PageTable, pages: PageRun, lane: LaneKind) -> Option<Claim> {
        let receive_mapping = self.regions.get(pages.region as usize)?.receive_mapping.as_ref()?;
        receive_mapping.ready(pages.page, pages.count)?;
        let method = InstallMethod::Received(receive_mapping.clone(), pages.page);
        self.claim_by(method, table, pages, lane)
    }

    fn claim_by(&self, method: InstallMethod, table: &mut PageTable, pages: PageRun, lane: LaneKind) -> Option<Claim> {
        let first = self.region(pages.region)?.page_of_piece(pages.page).0;
        let (hva, _) = self.address_map.address_of(first)?;
        let uffd = self.regions.get(pages.region as usize)?.uffd.clone();
        let take = |page| table.claim_for_install(page);
        Some(Claim::new((first, pages.count, hva), (uffd, method), lane.arrival(), take))
    }

    /// Takes pieces of huge pages with their bytes, from the `handled`-th on; advances it over those that are taken, or not
    /// wanted (any more). A page is installed with its last piece.
    pub fn pieces(
        &mut self,
        table: &mut PageTable,
        pages: PageRun,
        lane: LaneKind,
        bytes: &[u8],
        handled: &mut u64,
    ) -> Installed {
        let mut installed = Installed::default();
        let Some(region) = self.region(pages.region) else { return installed };
        while *handled < pages.count && installed.stop.is_none() {
            let rest = pages.after(*handled);
            let (page, piece) = region.page_of_piece(rest.page);
            let count = (region.pieces() - piece).min(rest.count);
            let bytes = &bytes[(*handled * PAGE_SIZE) as usize..][..(count * PAGE_SIZE) as usize];
            self.piece(table, &region, page, (piece, count, Some(bytes)), lane.arrival(), &mut installed);
            *handled += if installed.stop.is_none() { count } else { 0 };
        }
        installed
    }

    /// Pieces of a huge page are here; with the last of them the page is installed.
    fn piece(
        &mut self,
        table: &mut PageTable,
        region: &NumberedRegion,
        page: PageIndex,
        (piece, count, bytes): (u64, u64, Option<&[u8]>),
        arrival: Arrival,
        installed: &mut Installed,
    ) {
        if table.claim_for_install(page) {
            self.staged.insert(page, HugePageStaging::new(region.pieces()));
        }
        // Else it is there already, or not wanted.
        let Some(staging) = self.staged.get_mut(&page) else { return };
        staging.add(piece, count, bytes);
        installed.stop = self.install_if_whole(table, page, arrival, installed);
    }

    fn install_if_whole(
        &mut self,
        table: &mut PageTable,
        page: PageIndex,
        arrival: Arrival,
        installed: &mut Installed,
    ) -> Option<Stop> {
        let bytes = self.staged.get(&page)?.whole()?;
        let Some((uffd, hva, size)) = self.place_of(page) else { return Some(Stop::NotRegistered) };
        let stop = self.proven(uffd.copy(hva, bytes).stop, hva, size);
        if stop.is_none() {
            // EEXIST wakes nobody.
            let _ = uffd.wake(hva, size);
        }
        if stop.is_none() {
            table.mark_installed(page, arrival);
            self.staged.remove(&page);
            installed.runs.push((page, PageIndex(page.0 + 1)));
        }
        stop
    }

    /// All lanes broke: huge pages that came in part are absent again.
    pub fn abandon(&mut self, table: &mut PageTable) {
        for page in std::mem::take(&mut self.staged).into_keys() {
            table.release_install(page);
        }
    }

    /// Huge pages that have come in part.
    pub fn in_part(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.staged.keys().copied()
    }

    /// A huge page is not wanted any more.
    pub fn forget(&mut self, page: PageIndex) {
        self.staged.remove(&page);
    }

    // ---- zeros ----

    /// Zeros came. Pages that are whole with it and were not there before are in `runs`: those of them that are PRESENT as
    /// zeros are only written down, and made when touched.
    pub fn zeros(&mut self, table: &mut PageTable, pages: PageRun, lane: LaneKind) -> Installed {
        let mut installed = Installed::default();
        let Some(region) = self.region(pages.region) else { return installed };
        let (mut at, end) = (pages.page, pages.page + pages.count);
        while at < end && installed.stop.is_none() {
            let (page, piece) = region.page_of_piece(at);
            let count = (region.pieces() - piece).min(end - at);
            if count < region.pieces() || self.staged.contains_key(&page) {
                self.piece(table, &region, page, (piece, count, None), lane.arrival(), &mut installed);
            } else if table.claim_for_install(page) && table.mark_installed(page, Arrival::Zero) {
                match installed.runs.last_mut() {
                    Some(last) if last.1 == page => last.1.0 += 1,
                    _ => installed.runs.push((page, PageIndex(page.0 + 1))),
                }
            }
            at += count;
        }
        installed
    }

    /// A page that is neither missing nor poison was touched where it is not mapped: its file holds it (`minor`), or it
    /// reads as zeros.
    pub fn refill(&self, page: PageIndex, minor: bool) -> Option<Stop> {
        let (uffd, hva, size) = self.place_of(page)?;
        let mut stop = match (minor, size) {
            (true, _) => uffd.map(hva, size).stop,
            (false, PAGE_SIZE) => uffd.zeropage(hva, size).stop,
            // hugetlb has no ZEROPAGE.
            (false, _) => self.proven(uffd.copy(hva, &vec![0; size as usize]).stop, hva, size),
        };
        if !minor && stop == Some(Stop::AlreadyPresent) && self.is_by_file(page) {
            // The file holds zeros that were allocated ahead.
            stop = uffd.map(hva, size).stop;
        }
        self.or_wake(page, stop)
    }

    /// Makes a page of zeros that has just come, and wakes its vCPU. A frame that was allocated ahead and went bad is
    /// replaced: nothing was in it.
    pub fn make_zero(&self, page: PageIndex) -> Option<Stop> {
        let stop = self.refill(page, false);
        if stop != Some(BAD_FRAME) {
            return stop;
        }
        self.drop_contents(page, PageIndex(page.0 + 1));
        self.refill(page, false)
    }

    // ---- poison, and the end ----

    /// Installs the marker of a page that the table holds as poison, and wakes the threads that wait on it. Contents that a
    /// file holds of the page are dropped, so that nobody reads them again. A range that was unregistered (the migration is
    /// over) is registered again: from now on the page is guarded.
    ///
    /// [`Stop::AlreadyPresent`]: the guest can read the page, and the pager cannot take it away.
    pub fn poison(&self, page: PageIndex, had_contents: bool) -> Option<Stop> {
        let (uffd, hva, size) = self.place_of(page)?;
        if had_contents {
            // Before the contents go: else a touch in between would be given zeros by the kernel.
            self.register_again(page);
            self.drop_contents(page, PageIndex(page.0 + 1));
        }
        for _ in 0..MARKER_TRIES {
            match uffd.poison(hva, size).stop {
                Some(Stop::NotRegistered) if self.register_again(page) => {}
                Some(Stop::AlreadyPresent) if self.mappings.at(hva, size) != Mapping::Page => {
                    self.wake(page);
                    return None;
                }
                Some(Stop::AlreadyPresent) if self.drop_contents(page, PageIndex(page.0 + 1)) => {}
                stop => return stop,
            }
        }
        Some(Stop::AlreadyPresent)
    }

    /// Whether the VMM's page tables show the marker of a page; they show none of a huge page.
    pub fn has_marker(&self, page: PageIndex) -> bool {
        self.place_of(page).is_some_and(|(_, hva, size)| self.mappings.at(hva, size) == Mapping::Marker)
    }

    /// Places the marker of a page, if the VMM's mapping there is the one that was registered.
    pub fn mark_if_registered(&self, page: PageIndex) -> Option<Stop> {
        let (uffd, hva, size) = self.place_of(page)?;
        uffd.poison(hva, size).stop
    }

    fn register_again(&self, page: PageIndex) -> bool {
        let Some((uffd, hva, size)) = self.place_of(page) else { return false };
        let again = if self.is_by_file(page) { uffd.register_minor(hva, size) } else { uffd.register(hva, size) };
        again.is_ok()
    }

    /// Drops what a region's file holds of pages: those that were good and are poison now, since where only the mapping is
    /// dropped later (`MADV_DONTNEED`) they would be read again without a fault; and those of which part may have come and
    /// nothing is wanted. False: they could not be dropped; memory without a file has none to drop.
    pub fn drop_contents(&self, from: PageIndex, to: PageIndex) -> bool {
        let Some(region) = self.address_map.numbering().region_of(from) else { return false };
        let Some(RegionState { file: Some(file), .. }) = self.regions.get(region.number as usize) else { return false };
        let page_size = region.region.page_size;
        let offset = file.offset + (from.0 - region.first.0) * page_size;
        let size = (to.0 - from.0) * page_size;
        match punch_hole(&file.fd, offset, size) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, page = from.0, "pager.contents_kept");
                false
            }
        }
    }

    /// The outcome of a COPY of one huge page. `EEXIST` over a page that is not mapped means that there was no huge page to be
    /// had; over one that is mapped, that an earlier pager installed it and died before it could say so.
    fn proven(&self, stop: Option<Stop>, hva: Hva, size: u64) -> Option<Stop> {
        match stop {
            Some(Stop::AlreadyPresent) if self.mappings.at(hva, size) == Mapping::Page => None,
            Some(Stop::AlreadyPresent) => Some(Stop::NoMemory),
            stop => stop,
        }
    }

    /// `EEXIST` is success, but wakes nobody.
    fn or_wake(&self, page: PageIndex, stop: Option<Stop>) -> Option<Stop> {
        if stop != Some(Stop::AlreadyPresent) {
            return stop;
        }
        self.wake(page);
        None
    }

    /// Whoever waits on the page tries again.
    pub fn wake(&self, page: PageIndex) {
        if let Some((uffd, hva, size)) = self.place_of(page) {
            let _ = uffd.wake(hva, size);
        }
    }

    /// Whoever waits anywhere tries again: faults that an earlier pager read are not delivered twice.
    pub fn wake_all(&self) {
        for (region, (hva, size)) in self.regions.iter().zip(self.address_map.ranges()) {
            let _ = region.uffd.wake(hva, size);
        }
    }

    /// Unregisters a run of pages, none of which is missing or poison.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn unregister(&self, from: PageIndex, to: PageIndex) -> io::Result<()> {
        match self.place_of(from) {
            Some((uffd, hva, size)) => uffd.unregister(hva, (to.0 - from.0) * size),
            None => Ok(()),
        }
    }
}

/// Whether a descriptor was opened for writing.
fn is_writable(fd: &OwnedFd) -> bool {
    fd_passing::flags(fd).is_ok_and(|flags| flags & OFlags::ACCMODE == OFlags::RDWR)
}

#[cfg(test)]
mod tests;
