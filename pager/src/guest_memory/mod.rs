//! Reading a source's memory without ever touching it through a mapping of our own: no SIGBUS can reach this process.
//!
//! ```text
//!  memfd, file ── FileReader ─── SEEK_DATA (holes) · pread (EIO = poison) ──┐
//!                                                                           ├─▶ Found: data, zero, poison
//!  process ───── ProcessReader ─ pagemap (empty = zero) · process_vm_readv ─┘
//!                                (EFAULT = poison)
//!       both ─── Pagemap: poison markers in the VMM's page tables
//! ```
//!
//! A poison marker lives in one mapping only, so a `pread` of the memfd under it reads as if nothing had happened; the
//! page tables of the VMM are asked as well (docs/kernel-facts.md).

mod file;
mod pagemap;
mod process;

use std::io;

use bytes::{Bytes, BytesMut};

use crate::attached::{AttachedMemory, AttachedRegion};
use crate::region_map::{Backing, Hva, Region};

use file::FileReader;
use pagemap::Pagemap;
use process::ProcessReader;

/// Largest page this reader moves: a page must fit one reply.
const MAX_PAGE_SIZE: u64 = 2 << 20;

/// What a run of consecutive pages holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// `bytes.len() / page_size` pages.
    Data(Bytes),
    /// This many pages of zeros, holes included.
    Zero(u64),
    /// This many pages that cannot be read because they are poisoned.
    Poison(u64),
}

/// Why memory cannot be read. None of them means poison.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The VMM's process is gone, so its memory is.
    #[error("the VMM (pid {pid}) is gone, and its memory with it")]
    VmmGone {
        /// Its process id.
        pid: u32,
    },
    /// The VMM unmapped what it had attached.
    #[error("no memory is mapped at {hva:#x} in the VMM (pid {pid})")]
    NotMapped {
        /// First byte that is not.
        hva: u64,
        /// The process.
        pid: u32,
    },
    /// A call failed in a way that is not documented to mean poison.
    #[error("{what}: {source}")]
    Io {
        /// The call and its place.
        what: String,
        /// Its error.
        source: io::Error,
    },
    /// Pages of this size cannot be moved.
    #[error("pages of {page_size} bytes cannot be moved; use a backing with pages of at most {MAX_PAGE_SIZE} bytes")]
    PageSize {
        /// The region's.
        page_size: u64,
    },
}

/// The memory of one VM that stands still.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<RegionReader>,
}

#[derive(Debug)]
struct RegionReader {
    bytes: Origin,
    page_size: u64,
}

/// Where the bytes of a region come from.
#[derive(Debug)]
enum Origin {
    File(FileReader),
    Process(ProcessReader),
}

impl GuestMemory {
    /// Takes over what a VMM attached, and reads one byte of each region to see that it may.
    ///
    /// # Errors
    /// [`ReadError`] if a region cannot be read: no permission (`CAP_SYS_PTRACE`), no such process, not mapped.
    pub fn new(memory: AttachedMemory) -> Result<Self, ReadError> {
        let AttachedMemory { vmm_pid, layout, regions, uffd: _ } = memory;
        let readers = layout.regions().iter().zip(regions).map(|(region, at)| RegionReader::new(vmm_pid, region, at));
        Ok(Self { regions: readers.collect::<Result<_, _>>()? })
    }

    /// Reads `count` pages of a region from `page` on; consecutive pages of one kind come as one [`Found`].
    /// The caller has checked the range against the layout.
    ///
    /// # Errors
    /// [`ReadError`]; never for poison.
    pub fn read(&self, region: u32, page: u64, count: u64) -> Result<Vec<Found>, ReadError> {
        let reader = &self.regions[region as usize];
        let mut found = Vec::new();
        match &reader.bytes {
            Origin::File(file) => file.read(page, count, &mut found)?,
            Origin::Process(process) => process.read(page, count, &mut found)?,
        }
        let mut runs = Runs::new(reader.page_size);
        found.into_iter().for_each(|run| runs.push(run));
        Ok(runs.finish())
    }
}

impl RegionReader {
    fn new(pid: u32, region: &Region, at: AttachedRegion) -> Result<Self, ReadError> {
        let page_size = region.page_size;
        if page_size > MAX_PAGE_SIZE {
            return Err(ReadError::PageSize { page_size });
        }
        // A snapshot's memory file is mapped nowhere.
        let pagemap = if at.hva == Hva(0) { None } else { Pagemap::open(pid, at.hva, page_size)? };
        let bytes = match (region.backing, at.file) {
            (Backing::Memfd, Some(file)) => Origin::File(FileReader::new(file.fd, file.offset, region, pagemap)),
            _ => Origin::Process(ProcessReader::new(pid, at.hva, region, pagemap)?),
        };
        Ok(Self { bytes, page_size })
    }
}

/// Splits data at its zero pages and joins neighbours of one kind.
struct Runs {
    page_size: usize,
    done: Vec<Found>,
}

impl Runs {
    fn new(page_size: u64) -> Self {
        Self { page_size: page_size as usize, done: Vec::new() }
    }

    fn push(&mut self, run: Found) {
        match run {
            Found::Data(bytes) => self.push_data(&bytes),
            Found::Zero(count) => match self.done.last_mut() {
                Some(Found::Zero(before)) => *before += count,
                _ => self.done.push(Found::Zero(count)),
            },
            Found::Poison(count) => match self.done.last_mut() {
                Some(Found::Poison(before)) => *before += count,
                _ => self.done.push(Found::Poison(count)),
            },
        }
    }

    fn push_data(&mut self, bytes: &Bytes) {
        let mut start = 0;
        let mut at = 0;
        while at < bytes.len() {
            let end = at + self.page_size;
            if is_zero(&bytes[at..end]) {
                self.flush(bytes, start, at);
                self.push(Found::Zero(1));
                start = end;
            }
            at = end;
        }
        self.flush(bytes, start, bytes.len());
    }

    fn flush(&mut self, bytes: &Bytes, start: usize, end: usize) {
        if start < end {
            self.done.push(Found::Data(bytes.slice(start..end)));
        }
    }

    fn finish(self) -> Vec<Found> {
        self.done
    }
}

/// Whether a page is all zeros; most pages that are not say so in their first 64 bytes.
fn is_zero(page: &[u8]) -> bool {
    page.chunks(64).all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

/// A buffer of `len` bytes that is filled by `fill(pointer, done)` in as many calls as it takes. Nothing is zeroed first.
///
/// `fill` returns how many bytes it wrote at the pointer, which is `done` bytes into the buffer; it must not return more
/// than the rest. The loop ends at 0, at an error, or when the buffer is full; what was filled is returned either way.
fn fill_buffer(len: usize, mut fill: impl FnMut(*mut u8, usize) -> io::Result<usize>) -> (BytesMut, io::Result<()>) {
    let mut buffer = BytesMut::with_capacity(len);
    let mut outcome = Ok(());
    while buffer.len() < len {
        let done = buffer.len();
        match fill(buffer.spare_capacity_mut().as_mut_ptr().cast(), done) {
            Ok(0) => break,
            // SAFETY: `fill` wrote `n` bytes of the spare capacity, at most `len - done`.
            Ok(n) => unsafe { buffer.set_len((done + n).min(len)) },
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                outcome = Err(error);
                break;
            }
        }
    }
    (buffer, outcome)
}

#[cfg(test)]
mod tests;
