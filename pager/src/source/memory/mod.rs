//! Reads a source's memory. A frame may be bad anywhere, and no SIGBUS ends this process.
//!
//! ```text
//!  memfd, file ── FileReader ─── ReadMapping: pages in place ───────────────┐
//!                             ╰─ SEEK_DATA (holes) · pread (EIO = poison) ──┤
//!                                                                           ├─▶ Found: data, zero, poison
//!  process ───── ProcessReader ─ pagemap (empty = zero, ─ process_vm_readv ─┘
//!                                not for few pages)       (EFAULT = poison)
//!       both ─── Pagemap: poison markers in the VMM's page tables
//! ```
//!
//! A poison marker is in one mapping only: a `pread` of the memfd under it succeeds. So the readers look at the VMM's page
//! tables as well (docs/reference/kernel-facts.md), and keep a copy of the markers in case the VMM ends.
//!
//! All page numbers are of 4 KiB, as on lanes, for every backing. Of a huge page that is bad in part, only that part is
//! poison if the kernel reports it so.

mod file;
mod full_blocks;
mod huge_page_errors;
mod marker_copy;
mod process;
mod read_mapping;

use std::io;

use crate::layout::PAGE_SIZE;
use crate::layout::{Backing, Hva, Region};
use crate::vmm::attached_memory::{AttachedMemory, AttachedRegion};

use crate::sys::page_mapping::MappedPages;
use crate::sys::pagemap::{Pagemap, PagemapError};
use file::FileReader;
use process::ProcessReader;

/// Most pages that are read without a lookup. To look them up or to map them ahead takes as long as to read them.
const SMALL_READ: u64 = 4;

/// The contents of a run of consecutive pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// This many pages with contents.
    Data(u64),
    /// This many pages of zeros, holes included.
    Zero(u64),
    /// This many pages that cannot be read because they are poisoned.
    Poison(u64),
}

impl Found {
    /// Number of pages.
    pub fn count(self) -> u64 {
        match self {
            Self::Data(count) | Self::Zero(count) | Self::Poison(count) => count,
        }
    }

    fn with_count(self, count: u64) -> Self {
        match self {
            Self::Data(_) => Self::Data(count),
            Self::Zero(_) => Self::Zero(count),
            Self::Poison(_) => Self::Poison(count),
        }
    }
}

/// Consecutive runs. Neighbours of one kind are joined.
#[derive(Debug, Default)]
pub struct Runs(Vec<Found>);

impl Runs {
    fn push(&mut self, run: Found) {
        match self.0.last_mut() {
            _ if run.count() == 0 => {}
            Some(last) if std::mem::discriminant(last) == std::mem::discriminant(&run) => {
                *last = last.with_count(last.count() + run.count());
            }
            _ => self.0.push(run),
        }
    }

    /// The runs, in order.
    pub fn iter(&self) -> impl Iterator<Item = Found> + '_ {
        self.0.iter().copied()
    }
}

/// Finds the zero pages among the data. Page `n` of the runs is at `n * PAGE_SIZE` in `buffer`.
fn split_zeros(runs: &mut Runs, buffer: &[u8]) {
    let mut page = 0;
    for run in std::mem::take(&mut runs.0) {
        match run {
            Found::Data(count) => {
                let bytes = &buffer[(page * PAGE_SIZE) as usize..((page + count) * PAGE_SIZE) as usize];
                for page in bytes.chunks_exact(PAGE_SIZE as usize) {
                    runs.push(if is_zero(page) { Found::Zero(1) } else { Found::Data(1) });
                }
            }
            other => runs.push(other),
        }
        page += run.count();
    }
}

/// The place of the bytes of pages that were read; the first page comes first.
#[derive(Debug, Clone, Copy)]
pub enum PageBytes<'a> {
    /// The buffer of the caller.
    InBuffer,
    /// Pages of the guest's memory, at least as many as were read. They may still go bad.
    Mapped(MappedPages<'a>),
}

/// The reason that memory cannot be read. None means poison.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The VMM's process is gone, so its memory is.
    #[error("the VMM (pid {pid}) is gone, and its memory with it")]
    VmmGone {
        /// Its process id.
        pid: u32,
    },
    /// The VMM unmapped memory that it had attached.
    #[error("no memory is mapped at {hva:#x} in the VMM (pid {pid})")]
    NotMapped {
        /// First byte that is not mapped.
        hva: u64,
        /// The process.
        pid: u32,
    },
    /// The file ends before the region does: it became shorter after the VM was stopped.
    #[error(
        "the file of guest memory became shorter: it ends before offset {offset:#x}; the VM's memory is lost there"
    )]
    FileShorter {
        /// First byte that is not in the file any more.
        offset: u64,
    },
    /// A call failed in a way that is not documented to mean poison.
    #[error("{what}: {source}")]
    Io {
        /// The call and its place.
        what: String,
        /// Its error.
        source: io::Error,
    },
}

impl From<PagemapError> for ReadError {
    fn from(error: PagemapError) -> Self {
        match error {
            PagemapError::ProcessGone { pid } => Self::VmmGone { pid },
            PagemapError::Io { what, source } => Self::Io { what, source },
        }
    }
}

/// The memory of one VM. It is read while the VM is frozen.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<RegionReader>,
}

/// The reader of one region.
#[derive(Debug)]
enum RegionReader {
    File(FileReader),
    Process(ProcessReader),
}

impl GuestMemory {
    /// Takes the memory that a VMM attached, and reads one byte of each region to check that it may.
    ///
    /// # Errors
    /// [`ReadError`] if a region cannot be read: no permission (`CAP_SYS_PTRACE`), no such process, not mapped.
    pub fn new(memory: AttachedMemory) -> Result<Self, ReadError> {
        let AttachedMemory { vmm_pid, layout, regions, .. } = memory;
        let readers = layout.regions().iter().zip(regions).map(|(region, at)| region_reader(vmm_pid, region, at));
        Ok(Self { regions: readers.collect::<Result<_, _>>()? })
    }

    /// Maps pages ahead of later reads, while `go_on` allows it. The VM may run, and other threads may read.
    pub fn map_ahead(&self, go_on: impl Fn() -> bool) {
        for region in &self.regions {
            if let RegionReader::File(file) = region {
                file.map_ahead(&go_on);
            }
        }
    }

    /// Copies the markers in the page tables of a VMM with a stopped VM, while `go_on` allows it. Regions in files can then
    /// be read after the VMM's process has ended.
    ///
    /// # Errors
    /// [`ReadError`]: the markers of the other regions are not copied.
    pub fn copy_markers(&self, go_on: impl Fn() -> bool) -> Result<(), ReadError> {
        for region in &self.regions {
            if let RegionReader::File(file) = region {
                file.copy_markers(&go_on)?;
            }
        }
        Ok(())
    }

    /// Forgets all findings: the VM may have run before it was stopped now.
    pub fn stopped(&self) {
        for region in &self.regions {
            match region {
                RegionReader::File(file) => file.stopped(),
                RegionReader::Process(process) => process.stopped(),
            }
        }
    }

    /// Reads pages of a region from `page` on: as many as have their bytes in one place, at least one and at most `count`.
    /// `buffer` has room for `count`. `runs` gets the contents of each page, and the result is the place of the bytes.
    /// The caller has checked the range against the layout.
    ///
    /// # Errors
    /// [`ReadError`]; never for poison.
    pub fn read(
        &self,
        region: u32,
        page: u64,
        count: u64,
        buffer: &mut [u8],
        runs: &mut Runs,
    ) -> Result<PageBytes<'_>, ReadError> {
        runs.0.clear();
        let buffer = &mut buffer[..(count * PAGE_SIZE) as usize];
        match &self.regions[region as usize] {
            RegionReader::File(file) => file.read(page, count, buffer, runs),
            RegionReader::Process(process) => {
                process.read(page, count, buffer, runs)?;
                split_zeros(runs, buffer);
                Ok(PageBytes::InBuffer)
            }
        }
    }

    /// Half-open runs of pages of a region that hold memory, as far as a cheap lookup can tell.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn held(&self, region: u32) -> Result<Vec<(u64, u64)>, ReadError> {
        match &self.regions[region as usize] {
            RegionReader::File(file) => file.held(),
            RegionReader::Process(process) => process.held(),
        }
    }
}

fn region_reader(pid: u32, region: &Region, at: AttachedRegion) -> Result<RegionReader, ReadError> {
    // A snapshot's memory file is mapped nowhere.
    let pagemap = (at.hva != Hva(0)).then(|| Pagemap::open(pid, at.hva, region.page_size)).transpose()?;
    Ok(match (region.backing, at.file) {
        (Backing::Memfd, Some(file)) => {
            let reader = FileReader::new(file.fd, file.offset, region, pagemap);
            reader.check_length(region.size / PAGE_SIZE)?;
            RegionReader::File(reader)
        }
        _ => RegionReader::Process(ProcessReader::new(pid, at.hva, region, pagemap)?),
    })
}

/// Whether a page is all zeros. Most pages with contents have some in their first 64 bytes.
fn is_zero(page: &[u8]) -> bool {
    page.chunks(64).all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Fills a buffer by calls of `fill(rest, done)`. Returns the number of bytes, and the error that ended it early, if any.
fn fill_buffer(
    buffer: &mut [u8],
    mut fill: impl FnMut(&mut [u8], u64) -> io::Result<usize>,
) -> (usize, io::Result<()>) {
    let mut done = 0;
    while done < buffer.len() {
        match fill(&mut buffer[done..], done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (done, Err(error)),
        }
    }
    (done, Ok(()))
}

/// The bytes of pages `[from, to)` in a buffer that begins with page `first`.
fn pages_of(buffer: &mut [u8], first: u64, from: u64, to: u64) -> &mut [u8] {
    &mut buffer[((from - first) * PAGE_SIZE) as usize..((to - first) * PAGE_SIZE) as usize]
}

#[cfg(test)]
mod tests;
