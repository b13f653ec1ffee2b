//! A memfd, or a snapshot's memory file. Pages are shown where they lie, if they can be ([`ReadMapping`]). Otherwise
//! `SEEK_DATA` finds holes, `pread` the rest and `EIO` the poison.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::full_blocks::FullBlocks;
use super::huge_page_errors::HugePageErrors;
use super::marker_copy::MarkerCopy;
use super::read_mapping::ReadMapping;
use super::{Found, PageBytes, ReadError, Runs, SMALL_READ, fill_buffer, pages_of, split_zeros};
use crate::layout::PAGE_SIZE;
use crate::layout::Region;
use crate::sys::page_mapping::MappedPages;
use crate::sys::pagemap::{Pagemap, PagemapError};

#[derive(Debug)]
pub(super) struct FileReader {
    fd: File,
    /// Of the region's first byte in the file.
    offset: u64,
    pages: u64,
    /// Of the VMM's mapping of the file, if it has one.
    pagemap: Option<Pagemap>,
    /// Of the markers there.
    marker_copy: MarkerCopy,
    /// Of the region's pages; none of huge ones, whose holes and poison it could not tell.
    mapping: Option<ReadMapping>,
    full_blocks: FullBlocks,
    /// Of huge pages.
    huge_page_errors: Option<HugePageErrors>,
}

impl FileReader {
    /// The file is opened again: `lseek` must not move the VMM's own offset.
    pub fn new(fd: OwnedFd, offset: u64, region: &Region, pagemap: Option<Pagemap>) -> Self {
        let again = File::open(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let fd = again.unwrap_or_else(|_| File::from(fd));
        let mapping =
            (region.page_size == PAGE_SIZE).then(|| ReadMapping::new(&fd, offset, region.size)).and_then(Result::ok);
        let pages = region.size / PAGE_SIZE;
        let huge_page_errors = (region.page_size > PAGE_SIZE).then(|| HugePageErrors::new(region.page_size));
        let (marker_copy, full_blocks) = (MarkerCopy::new(pages, region.page_size / PAGE_SIZE), FullBlocks::new(pages));
        Self { fd, offset, pages, pagemap, marker_copy, mapping, full_blocks, huge_page_errors }
    }

    /// See [`super::GuestMemory::map_ahead`].
    pub fn map_ahead(&self, go_on: &impl Fn() -> bool) {
        if let Some(mapping) = &self.mapping {
            mapping.map_ahead(go_on);
        }
    }

    /// See [`super::GuestMemory::stopped`].
    pub fn stopped(&self) {
        self.full_blocks.forget();
        self.marker_copy.forget();
        self.huge_page_errors.iter().for_each(HugePageErrors::forget);
    }

    /// See [`super::GuestMemory::copy_markers`].
    pub fn copy_markers(&self, go_on: &impl Fn() -> bool) -> Result<(), ReadError> {
        let Some(pagemap) = &self.pagemap else { return Ok(()) };
        self.marker_copy.fill(go_on, |first, pages| match pagemap.may_have_markers(first, pages) {
            true => Ok(pagemap.markers(first, pages)?),
            false => Ok(vec![false; pages as usize]),
        })
    }

    /// For each of `count` pages from `page` on, whether a poison marker is there, or was when the VMM ended.
    fn markers(&self, page: u64, count: u64) -> Result<Vec<bool>, ReadError> {
        let Some(pagemap) = &self.pagemap else { return Ok(vec![false; count as usize]) };
        match pagemap.markers(page, count) {
            Err(PagemapError::ProcessGone { pid }) => {
                self.marker_copy.markers(page, count).ok_or(ReadError::VmmGone { pid })
            }
            found => Ok(found?),
        }
    }

    /// Pages from `page` on, at most `count` and at least one: as many as have their bytes in one place, which it says.
    /// `buffer` begins with the first.
    pub fn read(&self, page: u64, count: u64, buffer: &mut [u8], runs: &mut Runs) -> Result<PageBytes<'_>, ReadError> {
        if let Some(pages) = self.show_full_blocks(page, count, runs) {
            return Ok(PageBytes::Mapped(pages));
        }
        runs.0.clear();
        let mut markers = self.markers(page, count)?;
        if let Some(errors) = &self.huge_page_errors {
            errors.leave_markers(page, &mut markers, |at, buffer| self.pread(self.offset + at, buffer));
        }
        let alike = markers.iter().take_while(|marker| **marker == markers[0]).count() as u64;
        if markers[0] {
            runs.push(Found::Poison(alike));
            return Ok(PageBytes::InBuffer);
        }
        let unseen = match self.mapping.as_ref().map_or(Err(alike), |mapping| mapping.show(page, alike, runs)) {
            Ok(pages) => return Ok(PageBytes::Mapped(pages)),
            Err(unseen) => unseen,
        };
        self.read_unmarked(page, page + unseen, buffer, runs)?;
        split_zeros(runs, buffer);
        Ok(PageBytes::InBuffer)
    }

    /// Shows pages of whole blocks that have contents. One of zeros is looked at in full: it may have been given back since.
    fn show_full_blocks(&self, page: u64, count: u64, runs: &mut Runs) -> Option<MappedPages<'_>> {
        let mapping = self.mapping.as_ref()?;
        let is_whole = |first, pages| {
            mapping.has_all(first, pages)
                && self.pagemap.as_ref().is_none_or(|pagemap| !pagemap.may_have_markers(first, pages))
        };
        let pages =
            self.full_blocks.has(page, count, is_whole).then(|| mapping.show_resident(page, count, runs)).flatten()?;
        matches!(runs.0[..], [Found::Data(_)]).then_some(pages)
    }

    /// Pages `[first, end)`, a hole before the first of them that has data as zeros. Holes behind it are read: to look for
    /// one the kernel walks through the whole rest of the file.
    fn read_unmarked(&self, first: u64, end: u64, buffer: &mut [u8], runs: &mut Runs) -> Result<(), ReadError> {
        // A hole among so few pages is read as fast as it is found.
        let data = if end - first <= SMALL_READ { first } else { self.next_data(first, end)? };
        runs.push(Found::Zero(data - first));
        self.read_data(data, end, pages_of(buffer, first, data, end), runs)
    }

    /// The first page of `[page, end)` that has data in it, or `end`. A file system that knows no holes has data everywhere.
    fn next_data(&self, page: u64, end: u64) -> Result<u64, ReadError> {
        let from = self.offset + page * PAGE_SIZE;
        match seek(&self.fd, SeekFrom::Data(from)) {
            Ok(at) => Ok((at.saturating_sub(self.offset) / PAGE_SIZE).min(end)),
            // Nothing from here to the end of the file, which must not end before the pages do.
            Err(Errno::NXIO) => self.check_length(end).map(|()| end),
            Err(Errno::INVAL) => Ok(page),
            Err(error) => Err(self.failed("lseek", from, error.into())),
        }
    }

    /// The first page of `[page, end)` that is wholly in a hole, or `end`.
    fn next_hole(&self, page: u64, end: u64) -> Result<u64, ReadError> {
        let from = self.offset + page * PAGE_SIZE;
        match seek(&self.fd, SeekFrom::Hole(from)) {
            Ok(at) => Ok(at.saturating_sub(self.offset).div_ceil(PAGE_SIZE).min(end)),
            Err(Errno::NXIO) => self.check_length(end).map(|()| end),
            Err(Errno::INVAL) => Ok(end),
            Err(error) => Err(self.failed("lseek", from, error.into())),
        }
    }

    /// Reads pages `[first, end)`; those that give `EIO` are poison.
    fn read_data(&self, first: u64, end: u64, buffer: &mut [u8], runs: &mut Runs) -> Result<(), ReadError> {
        let mut page = first;
        while page < end {
            let from = self.offset + page * PAGE_SIZE;
            let rest = pages_of(buffer, first, page, end);
            let (filled, outcome) = fill_buffer(rest, |rest, done| self.pread(from + done, rest));
            match outcome {
                Ok(()) if filled < rest.len() => {
                    return Err(ReadError::FileShorter { offset: from + filled as u64 });
                }
                Ok(()) => {
                    runs.push(Found::Data(end - page));
                    page = end;
                }
                Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                    let whole = filled as u64 / PAGE_SIZE;
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
        self.fd.read_at(into, from)
    }

    /// Half-open runs of pages that are no holes.
    pub fn held(&self) -> Result<Vec<(u64, u64)>, ReadError> {
        let mut runs = Vec::new();
        let mut page = 0;
        while page < self.pages {
            let from = self.next_data(page, self.pages)?;
            if from == self.pages {
                break;
            }
            page = self.next_hole(from, self.pages)?.max(from + 1);
            runs.push((from, page));
        }
        Ok(runs)
    }

    /// Behind the end of the file are no holes.
    pub fn check_length(&self, end: u64) -> Result<(), ReadError> {
        let needed = self.offset + end * PAGE_SIZE;
        let length = self.fd.metadata().map_err(|error| self.failed("fstat", needed, error))?.len();
        if length < needed { Err(ReadError::FileShorter { offset: length }) } else { Ok(()) }
    }

    fn failed(&self, call: &str, offset: u64, source: io::Error) -> ReadError {
        ReadError::Io { what: format!("{call} of guest memory at file offset {offset:#x}"), source }
    }
}
