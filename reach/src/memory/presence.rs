//! Whether memory is empty: for a userfaultfd, a page that is there already is one that never faults, so it would be seen as
//! the destination happened to have it.
//!
//! Both must be empty: the page tables, and for a file its pages, which a mapping finds without a missing fault.

use std::fs::File;
use std::io;

use rustix::fs::{FallocateFlags, OFlags, fallocate, fstat};

use super::backing::{Backing, OpenFiles};
use super::mapping::{BASE_PAGE, Mapping, Mappings};
use crate::error::Error;
use crate::identity::Process;
use crate::inject::{Call, Injector};
use crate::proto::{HvaRange, MappingKind};
use crate::sys::{file_cache, pagemap};

/// Bytes that one injected madvise(2) drops: it limits how long its thread is stopped.
const DROP_BYTES: u64 = 64 << 20;

/// Looks at the memory of one process.
#[derive(Debug)]
pub struct Presence<'a> {
    process: &'a Process,
    mappings: Mappings,
    files: OpenFiles<'a>,
    pagemap: File,
}

impl<'a> Presence<'a> {
    /// Reads the mappings and opens the page tables.
    ///
    /// # Errors
    /// The process has ended, or may not be looked at.
    pub fn of(process: &'a Process) -> Result<Self, Error> {
        let mappings = Mappings::read(process)?;
        let files = OpenFiles::read(process)?;
        Ok(Self { process, mappings, files, pagemap: process.open("pagemap", OFlags::RDONLY)? })
    }

    /// Proves that ranges hold no page.
    ///
    /// # Errors
    /// [`Error::NotEmpty`] with the first page that is there; [`Error::Backing`]: memory that cannot be served.
    pub fn check_empty(&self, ranges: &[HvaRange]) -> Result<(), Error> {
        for range in ranges {
            if let Some(address) = self.first_page(range)? {
                return Err(Error::NotEmpty { address });
            }
        }
        Ok(())
    }

    /// The first page of a range that is there.
    ///
    /// # Errors
    /// As for [`Self::check_empty`].
    pub fn first_page(&self, range: &HvaRange) -> Result<Option<u64>, Error> {
        for piece in self.mappings.pieces(range)? {
            let backing = self.served_backing(&piece)?;
            let entry = pagemap::first_entry(&self.pagemap, piece.start, piece.end)
                .map_err(|error| self.process.failed("scan the page tables".into(), error))?;
            if let Some(address) = first_of(entry, self.first_file_page(&piece, &backing)?) {
                return Ok(Some(address.max(piece.start)));
            }
        }
        Ok(None)
    }

    /// Drops all pages of a range.
    ///
    /// # Errors
    /// The kernel refuses to, or memory that cannot be served.
    pub fn discard(&self, range: &HvaRange, injector: &mut Injector) -> Result<(), Error> {
        for piece in self.mappings.pieces(range)? {
            if has_file(&piece, &self.served_backing(&piece)?) {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(self.files.open(&piece, true)?, hole, piece.offset, piece.size())
                    .map_err(|error| self.process.failed(format!("punch a hole into {}", piece.path), error.into()))?;
            }
            if !piece.shared {
                for start in (piece.start..piece.end).step_by(DROP_BYTES as usize) {
                    injector.run(&Call::drop_pages(start, DROP_BYTES.min(piece.end - start)))?;
                }
            }
        }
        Ok(())
    }

    fn served_backing(&self, piece: &Mapping) -> Result<Backing, Error> {
        let refused = |why| Error::Backing { address: piece.start, path: piece.path.clone(), why };
        let backing = self.files.backing(piece)?;
        if backing.kind == MappingKind::File {
            return Err(refused("which is a file on a disk"));
        }
        if !(piece.start | piece.end).is_multiple_of(backing.page_size) {
            return Err(refused("whose huge pages the range cuts"));
        }
        Ok(backing)
    }

    fn first_file_page(&self, piece: &Mapping, backing: &Backing) -> Result<Option<u64>, Error> {
        if !has_file(piece, backing) {
            return Ok(None);
        }
        let failed = |error| self.process.failed(format!("look for pages of {}", piece.path), error);
        if fstat(self.files.look_at(piece)?).map_err(|error| failed(error.into()))?.st_blocks == 0 {
            return Ok(None);
        }
        let file = self.files.open(piece, true)?;
        let offset =
            first_page_of_file(piece, |offset, size| file_cache::pages(&file, offset, size)).map_err(failed)?;
        Ok(offset.map(|offset| piece.start + (offset - piece.offset)))
    }
}

/// Finds the first page of a piece by halving the range that has one. Where pages cannot be counted, any page of the file
/// counts as the first of the piece.
fn first_page_of_file(piece: &Mapping, count: impl Fn(u64, u64) -> io::Result<Option<u64>>) -> io::Result<Option<u64>> {
    let (mut offset, mut size) = (piece.offset, piece.size());
    match count(offset, size)? {
        None => return Ok(Some(offset)),
        Some(0) => return Ok(None),
        Some(_) => {}
    }
    while size > BASE_PAGE {
        let half = (size / 2).next_multiple_of(BASE_PAGE);
        if count(offset, half)?.unwrap_or(0) > 0 {
            size = half;
        } else {
            (offset, size) = (offset + half, size - half);
        }
    }
    Ok(Some(offset))
}

/// Whether pages may be in a file although the page tables have none. The file of private MAP_HUGETLB memory never has any.
fn has_file(piece: &Mapping, backing: &Backing) -> bool {
    match backing.kind {
        MappingKind::Anonymous => false,
        MappingKind::Hugetlbfs => piece.shared || !piece.path.starts_with("/anon_hugepage"),
        _ => true,
    }
}

fn first_of(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    one.into_iter().chain(other).min()
}
