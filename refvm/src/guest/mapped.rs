//! Writing to guest memory through its mapping: what `boot` does, before any vCPU runs.

use super::PAGE_SIZE;
use super::config::workload_runs;
use super::content::{WORDS, fill};
use super::image::Piece;
use crate::machine::MappedRegion;

/// Writes a plain value into the kernel area.
///
/// # Safety
/// `region0` is the mapped first region (GPA 0), holds `gpa` aligned to `T`, and nothing runs in it.
pub unsafe fn write<T: Copy>(region0: &MappedRegion, gpa: u64, value: T) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::write_volatile((region0.hva + gpa) as *mut T, value) }
}

/// Copies a piece into the kernel area.
///
/// # Safety
/// As of [`write()`], for the whole piece.
pub unsafe fn write_piece(region0: &MappedRegion, piece: &Piece) {
    let to = (region0.hva + piece.gpa) as *mut u8;
    // SAFETY: the caller's promise; the two do not overlap, since the piece is ours.
    unsafe { std::ptr::copy_nonoverlapping(piece.bytes.as_ptr(), to, piece.bytes.len()) }
}

/// Gives every page of the workload its content of generation 0, with as many threads as there are processors: most of
/// the time goes into finding host memory.
///
/// # Safety
/// The regions are mapped writable and nothing runs in them.
pub unsafe fn fill_workload(regions: &[MappedRegion], seed: u64) {
    let pages: Vec<(u64, u64)> = workload_runs(regions)
        .into_iter()
        .flat_map(|run| run.first..run.first + run.count)
        .filter_map(|page| Some((page, hva_of(regions, page * PAGE_SIZE)?)))
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for part in pages.chunks(pages.len().div_ceil(threads).max(1)) {
            scope.spawn(move || {
                for (page, hva) in part {
                    // SAFETY: a page of a mapped region (the caller's promise), aligned, and given to this thread alone.
                    let words = unsafe { &mut *(*hva as *mut [u64; WORDS]) };
                    fill(seed, *page, 0, words);
                }
            });
        }
    });
}

/// Where a guest-physical address is mapped; none if it is not RAM.
pub fn hva_of(regions: &[MappedRegion], gpa: u64) -> Option<u64> {
    regions.iter().find(|r| (r.gpa..r.gpa + r.size).contains(&gpa)).map(|r| r.hva + (gpa - r.gpa))
}

/// Which guest-physical address is mapped there; none if it is not guest memory.
pub fn gpa_of(regions: &[MappedRegion], hva: u64) -> Option<u64> {
    regions.iter().find(|r| (r.hva..r.hva + r.size).contains(&hva)).map(|r| r.gpa + (hva - r.hva))
}
