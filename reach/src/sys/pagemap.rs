//! The page tables of another process.

use std::fs::File;
use std::io;

use vmferry_pagemap::{BASE_PAGE, IS_PRESENT, IS_SWAPPED, PageRegion, entries, scan};

/// Entries of one read, if the kernel cannot scan.
const ENTRIES_A_READ: u64 = 4096;

/// Finds the first page of a range that has an entry: a page, the zero page, swap or a marker.
///
/// # Errors
/// The process has ended (`ESRCH`).
pub fn first_entry(pagemap: &File, start: u64, end: u64) -> io::Result<Option<u64>> {
    match scan(pagemap, start, end, IS_PRESENT | IS_SWAPPED, &mut [PageRegion::default()]) {
        Ok((found, _)) => Ok(found.first().map(|found| found.start)),
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => first_read_entry(pagemap, start, end),
        Err(error) => Err(error),
    }
}

/// For kernels before 6.7.
fn first_read_entry(pagemap: &File, start: u64, end: u64) -> io::Result<Option<u64>> {
    let mut at = start;
    while at + BASE_PAGE <= end {
        let count = ENTRIES_A_READ.min((end - at) / BASE_PAGE);
        if let Some(number) = entries(pagemap, at, count)?.iter().position(|entry| !entry.is_empty()) {
            return Ok(Some(at + number as u64 * BASE_PAGE));
        }
        at += count * BASE_PAGE;
    }
    Ok(None)
}

/// The entry of a page that is not mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Nothing.
    Empty,
    /// A guard page of the process's own making.
    Guard,
    /// A page, swap, or a marker. The kernel tells them apart only with CAP_SYS_ADMIN.
    Other,
}

/// Reads the entry of one page.
///
/// # Errors
/// The process has ended.
pub fn entry(pagemap: &File, address: u64) -> io::Result<Entry> {
    Ok(match entries(pagemap, address, 1)?.first() {
        Some(entry) if entry.is_guard() => Entry::Guard,
        Some(entry) if !entry.is_empty() => Entry::Other,
        _ => Entry::Empty,
    })
}

#[cfg(test)]
mod tests;
