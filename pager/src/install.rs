//! Puts arriving pages where the VMM finds them. A page's state is written before the ioctl; each ioctl wakes who waits on
//! what it installed; a range is split at every page that was not claimed.
//!
//! | region | bytes are received | installed by |
//! |---|---|---|
//! | of a file that this process can map (memfd) | in place, into the file, for pages claimed before | CONTINUE |
//! | any other | into a buffer | COPY, for pages claimed then |
//!
//! A huge page is claimed at its first piece of 4 KiB and installed when it has the last. Zeros are only written down:
//! the page is made when somebody touches it.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;

use crate::arriving::{Arriving, Lane, Pages};
use crate::assembly::Assembly;
use crate::attached::AttachedFile;
use crate::lane::PAGE;
use crate::mapping::Mapping;
use crate::page_table::{Arrival, PageState, PageTable};
use crate::placement::{NumberedRegion, PageIndex, Placement};
use crate::region_map::Hva;
use crate::userfaultfd::{Progress, Stop, Userfaultfd};

/// How far an install came.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Installed {
    /// Pages that are there now and were not before, as half-open runs.
    pub runs: Vec<(PageIndex, PageIndex)>,
    /// Why not further.
    pub stop: Option<Stop>,
}

/// What is under a region.
#[derive(Debug)]
struct Ground {
    file: Option<AttachedFile>,
    /// The file in this process, where pages are received in place.
    in_place: Option<Arc<Mapping>>,
}

/// The VMM's memory, as ioctls reach it.
#[derive(Debug)]
pub struct Installer {
    uffd: Rc<Userfaultfd>,
    placement: Placement,
    grounds: Vec<Ground>,
    /// Huge pages that have come in part.
    assemblies: HashMap<PageIndex, Assembly>,
}

impl Installer {
    /// `uffd` acts on the address space in which `placement` holds; `files` in the order of the layout. `fresh`: no page has
    /// come yet.
    ///
    /// # Errors
    /// The file of a region whose pages an earlier pager received in place cannot be received into now: what it holds of a
    /// page that has not arrived whole would pass for the page.
    pub fn new(
        uffd: Rc<Userfaultfd>,
        placement: Placement,
        files: Vec<Option<AttachedFile>>,
        fresh: bool,
    ) -> io::Result<Self> {
        let mut grounds = Vec::new();
        for (file, (hva, size)) in files.into_iter().zip(placement.ranges()) {
            let in_place = match &file {
                None => None,
                Some(file) => match in_place(&uffd, file, hva, size) {
                    Ok(mapping) => Some(Arc::new(mapping)),
                    Err(error) if fresh => {
                        tracing::info!(%error, hva = hva.0, "pager.not_in_place");
                        None
                    }
                    Err(error) => return Err(error),
                },
            };
            grounds.push(Ground { file, in_place });
        }
        Ok(Self { uffd, placement, grounds, assemblies: HashMap::new() })
    }

    /// Where the pages are.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// The descriptor, to read events from.
    pub fn uffd(&self) -> &Rc<Userfaultfd> {
        &self.uffd
    }

    /// The mapping of each region that is received in place, in the order of the layout.
    pub fn mappings(&self) -> Vec<Option<Arc<Mapping>>> {
        self.grounds.iter().map(|ground| ground.in_place.clone()).collect()
    }

    fn region(&self, number: u32) -> Option<&NumberedRegion> {
        self.placement.numbering().regions().get(number as usize)
    }

    fn mapping(&self, region: &NumberedRegion) -> Option<&Mapping> {
        self.grounds.get(region.number as usize)?.in_place.as_deref()
    }

    fn mapping_of(&self, page: PageIndex) -> Option<&Mapping> {
        self.placement.numbering().region_of(page).and_then(|region| self.mapping(region))
    }

    // ---- data ----

    /// A DATA frame begins: claims those of its pages whose bytes go where they stay.
    ///
    /// # Errors
    /// [`Stop::NoMemory`]: no huge page is free on this host.
    pub fn begin(&mut self, table: &mut PageTable, pages: Pages, lane: Lane) -> Result<Arriving, Stop> {
        let mut arriving = Arriving { pages, lane, received: 0, claimed: 0, dealt: 0 };
        let Some(region) = self.region(pages.region).copied() else { return Ok(arriving) };
        let huge = region.pieces() > 1;
        if !huge && self.mapping(&region).is_none() {
            return Ok(arriving);
        }
        for index in 0..pages.count {
            let (page, piece) = region.page_of_piece(pages.page + index);
            let claimed = match huge {
                false => table.claim_for_install(page),
                true => self.assembly(table, &region, page)?.is_some_and(|assembly| !assembly.has(piece)),
            };
            arriving.claimed |= u64::from(claimed) << index;
        }
        Ok(arriving)
    }

    /// What has come of a huge page; `None` if it is not wanted. The first time the page is claimed.
    fn assembly(
        &mut self,
        table: &mut PageTable,
        region: &NumberedRegion,
        page: PageIndex,
    ) -> Result<Option<&mut Assembly>, Stop> {
        let size = region.region.page_size;
        if table.claim_for_install(page) {
            let gathered = match self.mapping(region) {
                None => Some(size),
                Some(mapping) => {
                    if let Err(error) = mapping.populate((page.0 - region.first.0) * size, size) {
                        tracing::debug!(%error, page = page.0, "pager.no_huge_page");
                        table.release_install(page);
                        return Err(Stop::NoMemory);
                    }
                    None
                }
            };
            self.assemblies.insert(page, Assembly::new(region.pieces(), gathered));
        }
        Ok(self.assemblies.get_mut(&page))
    }

    /// Where the bytes of page `index` of a frame go from now on; `None`: nowhere, the page is not wanted (any more), or
    /// they are taken from a buffer at the end. The address is good until the state of a page changes.
    pub fn target(&mut self, table: &PageTable, arriving: &Arriving, index: u64) -> Option<*mut u8> {
        if !arriving.has_claimed(index) {
            return None;
        }
        let region = *self.region(arriving.pages.region)?;
        let (page, piece) = region.page_of_piece(arriving.pages.page + index);
        if table.state(page) != Some(PageState::Installing) {
            return None;
        }
        match self.mapping(&region) {
            Some(mapping) => Some(mapping.at((arriving.pages.page + index) * PAGE)),
            None => self.assemblies.get_mut(&page)?.at(piece * PAGE),
        }
    }

    /// All bytes of a frame are here, those of pages without a target in `scratch`: installs its pages. Called again
    /// after a stop, it goes on where it stopped.
    pub fn finish(&mut self, table: &mut PageTable, arriving: &mut Arriving, scratch: &[u8]) -> Installed {
        let mut installed = Installed::default();
        let Some(region) = self.region(arriving.pages.region).copied() else { return installed };
        let arrival = arriving.lane.arrival();
        while arriving.dealt < arriving.pages.count && installed.stop.is_none() {
            if region.pieces() > 1 {
                self.finish_piece(table, arriving, &region, &mut installed);
                continue;
            }
            let first = PageIndex(region.first.0 + arriving.pages.page + arriving.dealt);
            let end = PageIndex(region.first.0 + arriving.pages.page + arriving.pages.count);
            let in_place = self.mapping(&region).is_some();
            let to = match in_place {
                true => {
                    let here = (first.0..end.0).take_while(|p| arrived(table, arriving, PageIndex(*p), p - first.0));
                    PageIndex(first.0 + here.count() as u64)
                }
                false => claim(table, first, end),
            };
            if to == first {
                arriving.dealt += 1;
                continue;
            }
            let (mut reached, mut stop) =
                self.install(table, first, to, arrival, |this, hva, size, done| match in_place {
                    true => this.uffd.map(hva, size),
                    false => {
                        let from = (arriving.dealt * PAGE + done) as usize;
                        this.uffd.copy(hva, &scratch[from..from + size as usize])
                    }
                });
            if reached > first {
                installed.runs.push((first, reached));
            }
            if in_place && stop == Some(Stop::Refused(libc::EFAULT)) {
                // The VMM took the page out of the file meanwhile: it is asked for again.
                table.release_install(reached);
                (reached.0, stop) = (reached.0 + 1, None);
            }
            if !in_place {
                (reached.0..to.0).for_each(|page| _ = table.release_install(PageIndex(page)));
            }
            arriving.dealt += reached.0 - first.0;
            installed.stop = stop;
        }
        installed
    }

    /// One piece of a huge page is here; with the last the page is installed.
    fn finish_piece(
        &mut self,
        table: &mut PageTable,
        arriving: &mut Arriving,
        region: &NumberedRegion,
        installed: &mut Installed,
    ) {
        let (page, piece) = region.page_of_piece(arriving.pages.page + arriving.dealt);
        if arriving.has_claimed(arriving.dealt)
            && let Some(assembly) = self.assemblies.get_mut(&page)
        {
            assembly.add(piece);
            installed.stop = self.install_if_whole(table, page, arriving.lane.arrival(), installed);
        }
        arriving.dealt += u64::from(installed.stop.is_none());
    }

    fn install_if_whole(
        &mut self,
        table: &mut PageTable,
        page: PageIndex,
        arrival: Arrival,
        installed: &mut Installed,
    ) -> Option<Stop> {
        let assembly = self.assemblies.remove(&page)?;
        if !assembly.is_whole() {
            self.assemblies.insert(page, assembly);
            return None;
        }
        let end = PageIndex(page.0 + 1);
        let (reached, stop) = self.install(table, page, end, arrival, |this, hva, size, _| match assembly.buffer() {
            Some(bytes) => this.uffd.copy(hva, bytes),
            None => this.uffd.map(hva, size),
        });
        if reached == end {
            installed.runs.push((page, end));
        } else {
            self.assemblies.insert(page, assembly);
        }
        stop
    }

    /// Every page in `[from, to)` is claimed. Returns how far they are installed now.
    fn install(
        &self,
        table: &mut PageTable,
        from: PageIndex,
        to: PageIndex,
        arrival: Arrival,
        ioctl: impl Fn(&Self, Hva, u64, u64) -> Progress,
    ) -> (PageIndex, Option<Stop>) {
        let mut at = from;
        while at < to {
            let Some((hva, page_size)) = self.placement.address_of(at) else { return (at, Some(Stop::NotRegistered)) };
            let progress = ioctl(self, hva, (to.0 - at.0) * page_size, (at.0 - from.0) * page_size);
            let mut reached = PageIndex(at.0 + progress.done / page_size);
            let mut stop = progress.stop;
            if stop == Some(Stop::AlreadyPresent) {
                // Installed by a pager that died before it could say so. EEXIST wakes nobody.
                let _ = self.uffd.wake(Hva(hva.0 + progress.done), page_size);
                reached.0 += 1;
                stop = None;
            }
            (at.0..reached.0).for_each(|page| _ = table.mark_installed(PageIndex(page), arrival));
            at = reached;
            if stop.is_some() {
                return (at, stop);
            }
        }
        (at, None)
    }

    /// The lane of a frame broke: what was claimed for it is absent again. Nobody has seen any of it, for it is not mapped.
    pub fn abandon(&mut self, table: &mut PageTable, arriving: &Arriving) {
        let Some(region) = self.region(arriving.pages.region).copied() else { return };
        if region.pieces() > 1 {
            // Pieces that came whole stay; the page is asked for again as long as it is not.
            return;
        }
        for index in arriving.dealt..arriving.pages.count {
            if arriving.has_claimed(index) {
                table.release_install(region.page_of_piece(arriving.pages.page + index).0);
            }
        }
    }

    /// All lanes broke: huge pages that came in part are absent again.
    pub fn abandon_all(&mut self, table: &mut PageTable) {
        for page in std::mem::take(&mut self.assemblies).into_keys() {
            table.release_install(page);
            self.drop_contents(page, PageIndex(page.0 + 1));
        }
    }

    /// Huge pages that have come in part.
    pub fn in_part(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.assemblies.keys().copied()
    }

    /// A huge page is not wanted any more.
    pub fn forget(&mut self, page: PageIndex) {
        if self.assemblies.remove(&page).is_some() {
            self.drop_contents(page, PageIndex(page.0 + 1));
        }
    }

    // ---- zeros ----

    /// Zeros came for `[from, to)` of the pages of a frame. Pages that are whole with it and were not there before are in
    /// `runs`: they are written down, and made when touched.
    pub fn zeros(&mut self, table: &mut PageTable, pages: Pages, lane: Lane) -> Installed {
        let mut installed = Installed::default();
        let Some(region) = self.region(pages.region).copied() else { return installed };
        let pieces = region.pieces();
        let (mut at, end) = (pages.page, pages.page + pages.count);
        while at < end {
            let (page, piece) = region.page_of_piece(at);
            let count = (pieces - piece).min(end - at);
            if count == pieces && !self.assemblies.contains_key(&page) {
                if table.claim_for_install(page) && table.mark_installed(page, Arrival::Zero) {
                    match installed.runs.last_mut() {
                        Some(last) if last.1 == page => last.1.0 += 1,
                        _ => installed.runs.push((page, PageIndex(page.0 + 1))),
                    }
                }
            } else {
                match self.assembly(table, &region, page) {
                    Ok(Some(assembly)) => {
                        (piece..piece + count).for_each(|piece| assembly.add(piece));
                        installed.stop = self.install_if_whole(table, page, lane.arrival(), &mut installed);
                    }
                    Ok(None) => {}
                    Err(stop) => installed.stop = Some(stop),
                }
                if installed.stop.is_some() {
                    return installed;
                }
            }
            at += count;
        }
        installed
    }

    /// A page that is neither missing nor poison was touched where it is not mapped: its file holds it (`minor`), or it
    /// reads as zeros.
    pub fn refill(&mut self, page: PageIndex, minor: bool) -> Option<Stop> {
        let (hva, size) = self.placement.address_of(page)?;
        let mut stop = if minor { self.uffd.map(hva, size).stop } else { self.zero(page, hva, size) };
        if !minor && stop == Some(Stop::AlreadyPresent) && self.mapping_of(page).is_some() {
            // The file holds zeros that were allocated ahead.
            stop = self.uffd.map(hva, size).stop;
        }
        self.or_wake(hva, size, stop)
    }

    fn zero(&self, page: PageIndex, hva: Hva, size: u64) -> Option<Stop> {
        if size == PAGE {
            return self.uffd.zeropage(hva, size).stop;
        }
        // hugetlb has no ZEROPAGE.
        let Some((mapping, region)) = self.mapping_of(page).zip(self.placement.numbering().region_of(page)) else {
            return self.uffd.copy(hva, &vec![0; size as usize]).stop;
        };
        match mapping.populate((page.0 - region.first.0) * size, size) {
            Ok(()) => self.uffd.map(hva, size).stop,
            Err(_) => Some(Stop::NoMemory),
        }
    }

    // ---- poison, and the end ----

    /// Installs the marker of a page that the table holds as poison, and wakes who waits on it. Where the range was
    /// unregistered (the migration is over), it is registered again: from now on the page is guarded.
    pub fn poison(&self, page: PageIndex) -> Option<Stop> {
        let (hva, page_size) = self.placement.address_of(page)?;
        let mut stop = self.uffd.poison(hva, page_size).stop;
        if stop == Some(Stop::NotRegistered) && self.register(page, hva, page_size).is_ok() {
            stop = self.uffd.poison(hva, page_size).stop;
        }
        self.or_wake(hva, page_size, stop)
    }

    fn register(&self, page: PageIndex, hva: Hva, size: u64) -> io::Result<()> {
        match self.mapping_of(page) {
            Some(_) => self.uffd.register_minor(hva, size),
            None => self.uffd.register(hva, size),
        }
    }

    /// Drops what a region's file holds of pages: those that were good and are poison now, since where only the mapping is
    /// dropped later (`MADV_DONTNEED`) they would be read again without a fault; and those of which part may have come and
    /// nothing is wanted. Memory without a file has none to drop.
    pub fn drop_contents(&self, from: PageIndex, to: PageIndex) {
        let Some(region) = self.placement.numbering().region_of(from) else { return };
        let Some(Ground { file: Some(file), .. }) = self.grounds.get(region.number as usize) else { return };
        let page_size = region.region.page_size;
        let offset = file.offset + (from.0 - region.first.0) * page_size;
        let size = (to.0 - from.0) * page_size;
        let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory is passed.
        let done = unsafe { libc::fallocate(file.fd.as_raw_fd(), how, offset as i64, size as i64) };
        if done != 0 {
            tracing::warn!(error = %io::Error::last_os_error(), page = from.0, "pager.contents_kept");
        }
    }

    /// Whether pages of this region are received in place.
    pub fn is_in_place(&self, page: PageIndex) -> bool {
        self.mapping_of(page).is_some()
    }

    /// `EEXIST` is success, but wakes nobody.
    fn or_wake(&self, hva: Hva, page_size: u64, stop: Option<Stop>) -> Option<Stop> {
        if stop != Some(Stop::AlreadyPresent) {
            return stop;
        }
        let _ = self.uffd.wake(hva, page_size);
        None
    }

    /// Whoever waits on the page tries again.
    pub fn wake(&self, page: PageIndex) {
        if let Some((hva, page_size)) = self.placement.address_of(page) {
            let _ = self.uffd.wake(hva, page_size);
        }
    }

    /// Whoever waits anywhere tries again: faults that an earlier pager read are not delivered twice.
    pub fn wake_all(&self) {
        for (hva, size) in self.placement.ranges() {
            let _ = self.uffd.wake(hva, size);
        }
    }

    /// Unregisters a run of pages, none of which is missing or poison.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn unregister(&self, from: PageIndex, to: PageIndex) -> io::Result<()> {
        match self.placement.address_of(from) {
            Some((hva, page_size)) => self.uffd.unregister(hva, (to.0 - from.0) * page_size),
            None => Ok(()),
        }
    }
}

/// Maps a region's file here and has the VMM's faults on what the file holds told as well.
fn in_place(uffd: &Userfaultfd, file: &AttachedFile, hva: Hva, size: u64) -> io::Result<Mapping> {
    let mapping = Mapping::writable(&file.fd, file.offset, size)?;
    uffd.register_minor(hva, size)?;
    Ok(mapping)
}

/// Whether the page `ahead` of where the frame stands was received in place, and is still wanted.
fn arrived(table: &PageTable, arriving: &Arriving, page: PageIndex, ahead: u64) -> bool {
    arriving.has_claimed(arriving.dealt + ahead) && table.state(page) == Some(PageState::Installing)
}

/// Claims pages from `at` on, up to the first that is not to be written.
fn claim(table: &mut PageTable, at: PageIndex, end: PageIndex) -> PageIndex {
    let claimed = (at.0..end.0).take_while(|page| table.claim_for_install(PageIndex(*page))).count();
    PageIndex(at.0 + claimed as u64)
}
