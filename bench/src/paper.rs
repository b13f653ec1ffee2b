//! The cost of a VM that is larger than this machine: bytes and seconds, by the pager's own library.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;
use vmferry_pager::internals::{Arrival, Backing, Gpa, MemoryLayout, PageIndex, PageTable, PushOrder, Region};

const PAGE: u64 = 4096;

/// Of one layout. Bytes on disk are those of the blocks that the file has: on a tmpfs, of memory.
#[derive(Debug, Serialize)]
pub struct Paper {
    /// Pages of the VM.
    pub pages: u64,
    /// Bytes of the page table's file, with holes.
    pub table_bytes: u64,
    /// To make it, with every page absent.
    pub anew_s: f64,
    /// Bytes it has on disk then.
    pub anew_used_bytes: u64,
    /// To open it again, with every page absent.
    pub again_s: f64,
    /// Bytes it has on disk then.
    pub again_used_bytes: u64,
    /// To write that every page is present, by claim and mark.
    pub fill_s: f64,
    /// Bytes it has on disk then.
    pub full_used_bytes: u64,
    /// To open it again, with every page present.
    pub full_again_s: f64,
    /// Bytes of the order of a push; they do not depend on the pages to send.
    pub order_bytes: u64,
}

/// Makes and measures; removes the table.
///
/// # Errors
/// Of the page table, or /proc.
pub fn measure(directory: &Path, memory: u64) -> Result<Paper, Box<dyn std::error::Error>> {
    let layout =
        MemoryLayout::new(vec![Region { gpa: Gpa(0), size: memory, page_size: PAGE, backing: Backing::Memfd }])?;
    let path = directory.join("pages");
    let stat = || path.metadata();
    let (table, anew_s) = timed(|| PageTable::open(&path, &layout));
    let ((table, _), anew) = (table?, stat()?);
    let pages = table.total();
    drop(table);
    let (table, again_s) = timed(|| PageTable::open(&path, &layout));
    let ((mut table, existed), again) = (table?, stat()?);
    let (filled, fill_s) = timed(|| {
        (0..pages).map(PageIndex).all(|page| table.claim_for_install(page) && table.mark_installed(page, Arrival::Push))
    });
    let full = stat()?;
    drop(table);
    let (table, full_again_s) = timed(|| PageTable::open(&path, &layout));
    let missing = table?.0.counts().missing();
    std::fs::remove_file(&path)?;
    if !existed || !filled || missing != 0 {
        return Err(format!("the table forgot: existed {existed}, filled {filled}, missing {missing}").into());
    }
    let before = data_bytes()?;
    let order = PushOrder::new(&layout, std::iter::empty());
    let order_bytes = data_bytes()?.saturating_sub(before);
    drop(order);
    Ok(Paper {
        pages,
        table_bytes: anew.len(),
        anew_s,
        anew_used_bytes: used(&anew),
        again_s,
        again_used_bytes: used(&again),
        fill_s,
        full_used_bytes: used(&full),
        full_again_s,
        order_bytes,
    })
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let begun = Instant::now();
    let made = work();
    (made, begun.elapsed().as_secs_f64())
}

/// stat(2): `st_blocks` is in units of 512 bytes.
fn used(stat: &Metadata) -> u64 {
    stat.blocks() * 512
}

/// `VmData` of /proc/self/status: what this process has allocated, touched or not.
fn data_bytes() -> io::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmData:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|number| number.parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| io::Error::other("no VmData in /proc/self/status"))
}

#[cfg(test)]
mod tests;
