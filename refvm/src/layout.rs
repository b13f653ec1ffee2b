//! The layout of guest memory: its regions, and the rules for a layout. Pure.

use serde::{Deserialize, Serialize};

use crate::machine::KERNEL_BYTES;

/// Smallest page, bytes.
pub const PAGE_SIZE: u64 = 4096;
/// Pages that guest memory may be made of, bytes: the three sizes of x86-64.
pub const PAGE_SIZES: [u64; 3] = [PAGE_SIZE, 2 << 20, 1 << 30];

/// Where the hole for devices below 4 GiB begins: RAM beyond it continues at 4 GiB, as on a PC.
const HOLE_START: u64 = 3 << 30;
/// Where the hole ends.
const HOLE_END: u64 = 4 << 30;

/// The backing of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// Private anonymous memory, read by others through the process.
    Anonymous,
    /// A shared mapping of a memfd, one a region.
    Memfd,
}

/// The backing of all regions of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MadeOf {
    /// How it is mapped.
    pub backing: Backing,
    /// Bytes of a page, one of [`PAGE_SIZES`].
    pub page_size: u64,
}

impl From<Backing> for MadeOf {
    fn from(backing: Backing) -> Self {
        Self { backing, page_size: PAGE_SIZE }
    }
}

/// One region of guest memory, as the protocol names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionSpec {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Bytes.
    pub page_size: u64,
    /// Its backing.
    pub backing: Backing,
}

/// Why a layout is not acceptable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct LayoutError {
    /// The field of the message or option that is wrong, e.g. `regions[1].size`.
    pub field: String,
    /// Its value and the requirement.
    pub message: String,
    /// True where the layout is right but cannot be built by this VMM.
    pub unsupported: bool,
}

/// Splits `memory` bytes into `count` regions without gaps, but for the hole below 4 GiB.
///
/// # Errors
/// [`LayoutError`] with field `--memory` or `--regions`.
pub fn split(memory: u64, count: u32, made_of: impl Into<MadeOf>) -> Result<Vec<RegionSpec>, LayoutError> {
    let MadeOf { backing, page_size } = made_of.into();
    let wrong = |field: &str, message: String| LayoutError { field: field.into(), message, unsupported: false };
    if memory < 2 * KERNEL_BYTES || !memory.is_multiple_of(page_size) {
        let message = format!("{memory} bytes is not a multiple of {page_size} and at least {}", 2 * KERNEL_BYTES);
        return Err(wrong("--memory", message));
    }
    let pages = memory / page_size;
    let (count, share) = (u64::from(count.max(1)), pages / u64::from(count.max(1)));
    if share * page_size <= KERNEL_BYTES {
        let message = format!("{count} regions of {memory} bytes: the first must hold more than {KERNEL_BYTES}");
        return Err(wrong("--regions", message));
    }
    let mut regions = Vec::new();
    let mut gpa = 0;
    for index in 0..count {
        let mut left = page_size * if index + 1 == count { pages - share * (count - 1) } else { share };
        while left > 0 {
            if gpa == HOLE_START {
                gpa = HOLE_END;
            }
            let size = if gpa < HOLE_START { left.min(HOLE_START - gpa) } else { left };
            regions.push(RegionSpec { gpa, size, page_size, backing });
            gpa += size;
            left -= size;
        }
    }
    Ok(regions)
}

/// Checks a layout that came from elsewhere.
///
/// # Errors
/// [`LayoutError`] names the first field that is wrong.
pub fn check(regions: &[RegionSpec]) -> Result<(), LayoutError> {
    let wrong = |index: usize, name: &str, unsupported: bool, message: String| LayoutError {
        field: format!("regions[{index}].{name}"),
        message,
        unsupported,
    };
    let Some(first) = regions.first() else {
        return Err(LayoutError { field: "regions".into(), message: "is empty".into(), unsupported: false });
    };
    if first.gpa != 0 || first.size <= KERNEL_BYTES {
        let message = format!(
            "the first region is [{:#x}, +{:#x}); it must begin at 0 and be longer than {KERNEL_BYTES:#x}",
            first.gpa, first.size
        );
        return Err(wrong(0, "gpa", false, message));
    }
    let mut free_from = 0;
    for (index, region) in regions.iter().enumerate() {
        let page = region.page_size;
        if !PAGE_SIZES.contains(&page) {
            return Err(wrong(index, "page_size", true, format!("{page} is not one of {PAGE_SIZES:?}")));
        }
        if region.size == 0 || !region.size.is_multiple_of(page) {
            let message = format!("{:#x} is not a positive multiple of page_size {page:#x}", region.size);
            return Err(wrong(index, "size", false, message));
        }
        if !region.gpa.is_multiple_of(page) || region.gpa < free_from {
            let message = format!("{:#x} is not aligned to page_size {page:#x} at or above {free_from:#x}", region.gpa);
            return Err(wrong(index, "gpa", false, message));
        }
        free_from = region
            .gpa
            .checked_add(region.size)
            .ok_or_else(|| wrong(index, "size", false, format!("{:#x} ends beyond 2^64", region.size)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
