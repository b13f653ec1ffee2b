//! A memfd, or a snapshot's memory file: `SEEK_DATA` finds holes, `pread` or `splice` the rest and `EIO` the poison.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::pagemap::{Entry, Pagemap};
use super::{Found, ReadError, Runs, fill_buffer, is_zero, pages_of};
use crate::lane::{MOST_PAGES, PAGE};
use crate::mapping::Mapping;
use crate::region_map::Region;

/// Bytes at the start of a page that tell most pages from a zero page.
const PROBE: usize = 64;

#[derive(Debug)]
pub(super) struct FileReader {
    fd: OwnedFd,
    /// Of the region's first byte in the file.
    offset: u64,
    pages: u64,
    /// Of the VMM's mapping of the file, if it has one.
    pagemap: Option<Pagemap>,
    /// For probes; only ever read by `process_vm_readv`. `None` where pages cannot be spliced: hugetlbfs.
    mapping: Option<Mapping>,
}

/// A pipe that holds a DATA frame's pages by reference.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    /// Has room for the largest frame.
    ///
    /// # Errors
    /// What the kernel said: pipe(7) limits.
    pub fn new() -> io::Result<Self> {
        let mut fds: [RawFd; 2] = [-1; 2];
        // SAFETY: room for two descriptors.
        if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: new descriptors that nobody else owns.
        let pipe = unsafe { Self { read: OwnedFd::from_raw_fd(fds[0]), write: OwnedFd::from_raw_fd(fds[1]) } };
        // SAFETY: no memory is passed.
        if unsafe { libc::fcntl(pipe.write.as_raw_fd(), libc::F_SETPIPE_SZ, (MOST_PAGES * PAGE) as libc::c_int) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(pipe)
    }

    /// Moves what is in the pipe to a socket.
    ///
    /// # Errors
    /// What the kernel said; part may be sent.
    pub fn send(&self, to: RawFd, mut bytes: usize) -> io::Result<()> {
        while bytes > 0 {
            let (nowhere, flags) = (std::ptr::null_mut(), libc::SPLICE_F_MOVE);
            // SAFETY: no offsets are passed; both descriptors are open.
            let n = unsafe { libc::splice(self.read.as_raw_fd(), nowhere, to, nowhere, bytes, flags) };
            match usize::try_from(n) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => bytes -= n,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}

impl FileReader {
    /// The file is opened again: `lseek` must not move the VMM's own offset.
    pub fn new(fd: OwnedFd, offset: u64, region: &Region, pagemap: Option<Pagemap>) -> Self {
        let again = std::fs::File::open(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let fd = again.map_or(fd, OwnedFd::from);
        let mapping = match region.page_size {
            PAGE => Mapping::read_only(&fd, offset, region.size).ok(),
            _ => None,
        };
        Self { fd, offset, pages: region.size / PAGE, pagemap, mapping }
    }

    /// Pages `[page, page + count)`; `buffer` begins with the first.
    pub fn read(&self, page: u64, count: u64, buffer: &mut [u8], runs: &mut Runs) -> Result<(), ReadError> {
        self.unmarked(page, count, runs, |from, to, runs| {
            self.read_data(from, to, pages_of(buffer, page, from, to), runs)
        })
    }

    /// As [`FileReader::read`] without the bytes; false: it cannot be done, read them.
    pub fn survey(&self, page: u64, count: u64, runs: &mut Runs) -> Result<bool, ReadError> {
        let Some(mapping) = &self.mapping else { return Ok(false) };
        self.unmarked(page, count, runs, |from, to, runs| self.probe(mapping, from, to, runs))?;
        Ok(true)
    }

    /// Walks `[page, page + count)`: markers as poison, holes as zeros, the rest by `data(from, to, runs)`.
    fn unmarked(
        &self,
        page: u64,
        count: u64,
        runs: &mut Runs,
        mut data: impl FnMut(u64, u64, &mut Runs) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        let Some(pagemap) = &self.pagemap else { return self.around_holes(page, page + count, runs, &mut data) };
        let entries = pagemap.entries(page, count)?;
        let mut at = page;
        for run in entries.chunk_by(|a, b| (*a == Entry::PoisonMarker) == (*b == Entry::PoisonMarker)) {
            let end = at + run.len() as u64;
            if run[0] == Entry::PoisonMarker {
                runs.push(Found::Poison(end - at));
            } else {
                self.around_holes(at, end, runs, &mut data)?;
            }
            at = end;
        }
        Ok(())
    }

    fn around_holes(
        &self,
        mut page: u64,
        end: u64,
        runs: &mut Runs,
        data: &mut impl FnMut(u64, u64, &mut Runs) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        while page < end {
            let from = self.seek(page, end, libc::SEEK_DATA)?;
            runs.push(Found::Zero(from - page));
            if from == end {
                return Ok(());
            }
            page = self.seek(from, end, libc::SEEK_HOLE)?.max(from + 1);
            data(from, page, runs)?;
        }
        Ok(())
    }

    /// The first page of `[page, end)` that has data in it (`SEEK_DATA`) or is wholly in a hole (`SEEK_HOLE`), or `end`.
    fn seek(&self, page: u64, end: u64, what: libc::c_int) -> Result<u64, ReadError> {
        let from = self.offset + page * PAGE;
        // SAFETY: no memory is passed.
        let at = unsafe { libc::lseek(self.fd.as_raw_fd(), from as libc::off_t, what) };
        if at >= 0 {
            let bytes = (at as u64).saturating_sub(self.offset);
            let page = if what == libc::SEEK_DATA { bytes / PAGE } else { bytes.div_ceil(PAGE) };
            return Ok(page.min(end));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // Nothing from here to the end of the file.
            Some(libc::ENXIO) => Ok(end),
            // A file system that does not know holes.
            Some(libc::EINVAL) => Ok(if what == libc::SEEK_DATA { page } else { end }),
            _ => Err(self.failed("lseek", from, error)),
        }
    }

    /// Reads pages `[first, end)`; those that give `EIO` are poison.
    fn read_data(&self, first: u64, end: u64, buffer: &mut [u8], runs: &mut Runs) -> Result<(), ReadError> {
        let mut page = first;
        while page < end {
            let from = self.offset + page * PAGE;
            let rest = pages_of(buffer, first, page, end);
            let (filled, outcome) = fill_buffer(rest, |rest, done| self.pread(from + done, rest));
            match outcome {
                // Short of the end: the file ends here, and what lies beyond reads as zeros.
                Ok(()) => {
                    rest[filled..].fill(0);
                    runs.push(Found::Data(end - page));
                    page = end;
                }
                Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                    let whole = filled as u64 / PAGE;
                    runs.push(Found::Data(whole));
                    runs.push(Found::Poison(1));
                    page += whole + 1;
                }
                Err(error) => return Err(self.failed("pread", from, error)),
            }
        }
        Ok(())
    }

    fn pread(&self, from: u64, into: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the kernel writes at most `into`.
        let n = unsafe { libc::pread(self.fd.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), from as libc::off_t) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Tells zero pages from others by their first bytes, and reads whole only those that begin with zeros. A page that
    /// cannot be probed counts as data: whoever reads it finds out why.
    fn probe(&self, mapping: &Mapping, mut page: u64, end: u64, runs: &mut Runs) -> Result<(), ReadError> {
        while page < end {
            let count = (end - page).min(MOST_PAGES) as usize;
            let mut starts = [0u8; PROBE * MOST_PAGES as usize];
            let probed = mapping.read_starts::<PROBE>(page * PAGE, &mut starts[..count * PROBE]);
            for (index, start) in starts.chunks_exact(PROBE).take(count).enumerate() {
                let zero = index < probed && is_zero(start) && self.is_zero_page(page + index as u64);
                runs.push(if zero { Found::Zero(1) } else { Found::Data(1) });
            }
            page += count as u64;
        }
        Ok(())
    }

    fn is_zero_page(&self, page: u64) -> bool {
        let mut bytes = [0; PAGE as usize];
        let read = self.pread(self.offset + page * PAGE, &mut bytes);
        read.is_ok_and(|read| read == bytes.len()) && is_zero(&bytes)
    }

    /// See [`super::GuestMemory::splice`].
    pub fn splice(&self, page: u64, count: u64, into: &Pipe) -> Result<u64, ReadError> {
        let from = self.offset + page * PAGE;
        let mut at = from as libc::loff_t;
        let (to, flags) = (into.write.as_raw_fd(), libc::SPLICE_F_MOVE);
        let bytes = (count * PAGE) as usize;
        // SAFETY: `at` is the offset, which the kernel moves on; both descriptors are open.
        let n = unsafe { libc::splice(self.fd.as_raw_fd(), &raw mut at, to, std::ptr::null_mut(), bytes, flags) };
        match u64::try_from(n) {
            Ok(n) if n > 0 && n.is_multiple_of(PAGE) => Ok(n / PAGE),
            Ok(n) => {
                let short = io::Error::new(io::ErrorKind::UnexpectedEof, format!("{n} bytes, not whole pages"));
                Err(self.failed("splice", from, short))
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::EIO) => Ok(0),
                error => Err(self.failed("splice", from, error)),
            },
        }
    }

    /// Half-open runs of pages that are no holes.
    pub fn held(&self) -> Result<Vec<(u64, u64)>, ReadError> {
        let mut runs = Vec::new();
        let mut page = 0;
        while page < self.pages {
            let from = self.seek(page, self.pages, libc::SEEK_DATA)?;
            if from == self.pages {
                break;
            }
            page = self.seek(from, self.pages, libc::SEEK_HOLE)?.max(from + 1);
            runs.push((from, page));
        }
        Ok(runs)
    }

    fn failed(&self, call: &str, offset: u64, source: io::Error) -> ReadError {
        ReadError::Io { what: format!("{call} of guest memory at file offset {offset:#x}"), source }
    }
}
