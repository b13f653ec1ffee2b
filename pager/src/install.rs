//! Installs arrived pages in the VMM. A range is split at every page that was not claimed; a page's state is written
//! before the ioctl; each ioctl wakes who waits on what it installed.

use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;

use crate::attached::AttachedFile;
use crate::page_table::PageTable;
use crate::placement::{PageIndex, Placement};
use crate::region_map::Hva;
use crate::run::{Contents, PageRun};
use crate::userfaultfd::{Stop, Userfaultfd};

/// How far an install came.
#[derive(Debug, PartialEq, Eq)]
pub struct Installed {
    /// Pages that are there now and were not before, as half-open runs.
    pub runs: Vec<(PageIndex, PageIndex)>,
    /// Pages dealt with, from the start of the run: installed, or not wanted any more.
    pub dealt: u64,
    /// Why not further.
    pub stop: Option<Stop>,
}

/// The VMM's memory, as ioctls reach it.
#[derive(Debug)]
pub struct Installer {
    uffd: Rc<Userfaultfd>,
    placement: Placement,
    /// The file behind each region, where there is one.
    files: Vec<Option<AttachedFile>>,
    /// For zero pages where ZEROPAGE does not exist (hugetlb).
    zeros: Vec<u8>,
}

impl Installer {
    /// `uffd` acts on the address space in which `placement` holds; `files` in the order of the layout.
    pub fn new(uffd: Rc<Userfaultfd>, placement: Placement, files: Vec<Option<AttachedFile>>) -> Self {
        Self { uffd, placement, files, zeros: Vec::new() }
    }

    /// Where the pages are.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// The descriptor, to read events from.
    pub fn uffd(&self) -> &Rc<Userfaultfd> {
        &self.uffd
    }

    /// Installs at most `most` pages of a run of data or zeros.
    pub fn install(&mut self, table: &mut PageTable, run: &PageRun, most: u64) -> Installed {
        let end = PageIndex(run.first.0 + run.count.min(most));
        let mut at = run.first;
        let mut installed = Installed { runs: Vec::new(), dealt: 0, stop: None };
        while at < end && installed.stop.is_none() {
            let claimed = claim(table, at, end);
            if claimed == at {
                at.0 += 1;
                continue;
            }
            let (reached, stop) = self.install_claimed(table, run, at, claimed);
            if reached > at {
                installed.runs.push((at, reached));
            }
            for page in (reached.0..claimed.0).map(PageIndex) {
                table.release_install(page);
            }
            at = reached;
            installed.stop = stop;
        }
        installed.dealt = at.0 - run.first.0;
        installed
    }

    /// Every page in `[from, to)` is claimed. Returns how far they are installed now.
    fn install_claimed(
        &mut self,
        table: &mut PageTable,
        run: &PageRun,
        from: PageIndex,
        to: PageIndex,
    ) -> (PageIndex, Option<Stop>) {
        let mut at = from;
        while at < to {
            let Some((hva, page_size)) = self.placement.address_of(at) else { return (at, Some(Stop::NotRegistered)) };
            let size = (to.0 - at.0) * page_size;
            let progress = match &run.contents {
                Contents::Data(data) => {
                    let offset = ((at.0 - run.first.0) * page_size) as usize;
                    self.uffd.copy(hva, &data[offset..offset + size as usize])
                }
                Contents::Zero | Contents::Poison(_) => self.zero(hva, size, page_size),
            };
            let mut reached = PageIndex(at.0 + progress.done / page_size);
            let mut stop = progress.stop;
            if stop == Some(Stop::AlreadyPresent) {
                // Installed by a pager that died before it could say so. EEXIST wakes nobody.
                let _ = self.uffd.wake(Hva(hva.0 + progress.done), page_size);
                reached.0 += 1;
                stop = None;
            }
            for page in (at.0..reached.0).map(PageIndex) {
                table.mark_installed(page, run.arrival());
            }
            at = reached;
            if stop.is_some() {
                return (at, stop);
            }
        }
        (at, None)
    }

    fn zero(&mut self, hva: Hva, size: u64, page_size: u64) -> crate::userfaultfd::Progress {
        if page_size == 4096 {
            return self.uffd.zeropage(hva, size);
        }
        self.zeros.resize(page_size as usize, 0);
        self.uffd.copy(hva, &self.zeros)
    }

    /// Zeros for a page that the guest gave back and touches again.
    pub fn give_zero(&mut self, page: PageIndex) -> Option<Stop> {
        let (hva, page_size) = self.placement.address_of(page)?;
        let stop = self.zero(hva, page_size, page_size).stop;
        self.or_wake(hva, page_size, stop)
    }

    /// Installs the marker of a page that the table holds as poison, and wakes who waits on it. Where the range was
    /// unregistered (the migration is over), it is registered again: from now on the page is guarded.
    pub fn poison(&self, page: PageIndex) -> Option<Stop> {
        let (hva, page_size) = self.placement.address_of(page)?;
        let mut stop = self.uffd.poison(hva, page_size).stop;
        if stop == Some(Stop::NotRegistered) && self.uffd.register(hva, page_size).is_ok() {
            stop = self.uffd.poison(hva, page_size).stop;
        }
        self.or_wake(hva, page_size, stop)
    }

    /// Drops a file's contents of a page that was good and is poison now: where only the mapping is dropped later
    /// (`MADV_DONTNEED`), they would be read again without a fault. Memory without a file has none to drop.
    pub fn drop_contents(&self, page: PageIndex) {
        let Some(region) = self.placement.numbering().region_of(page) else { return };
        let Some(Some(file)) = self.files.get(region.number as usize) else { return };
        let page_size = region.region.page_size;
        let offset = file.offset + (page.0 - region.first.0) * page_size;
        let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory is passed.
        let done = unsafe { libc::fallocate(file.fd.as_raw_fd(), how, offset as i64, page_size as i64) };
        if done != 0 {
            tracing::warn!(error = %io::Error::last_os_error(), page = page.0, "pager.contents_kept");
        }
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

    /// The descriptor's number, for logs.
    pub fn descriptor(&self) -> i32 {
        self.uffd.as_raw_fd()
    }
}

/// Claims pages from `at` on, up to the first that is not to be written.
fn claim(table: &mut PageTable, at: PageIndex, end: PageIndex) -> PageIndex {
    let claimed = (at.0..end.0).take_while(|page| table.claim_for_install(PageIndex(*page))).count();
    PageIndex(at.0 + claimed as u64)
}
