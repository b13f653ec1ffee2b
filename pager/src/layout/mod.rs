//! The layout of a VM's memory, validated, and where its pages are.

pub mod address;
pub mod address_map;
pub mod page_run;

use crate::proto;

pub use address::{Gpa, HUGE_PAGE_SIZE, Hva, PAGE_SIZE, PageId};

/// The backing of a region in the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// A shared mapping of a file or memfd.
    Memfd,
}

/// One region of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub gpa: Gpa,
    /// Bytes.
    pub size: u64,
    /// Bytes.
    pub page_size: u64,
    /// Its backing.
    pub backing: Backing,
}

impl Region {
    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.size / self.page_size
    }
}

/// A valid layout: at least one region; ascending, not overlapping, aligned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLayout {
    regions: Vec<Region>,
}

/// Why a layout is not valid; `field` as in the message that carried it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct LayoutError {
    /// E.g. `regions[1].page_size`.
    pub field: String,
    /// The actual value and the requirement.
    pub message: String,
}

impl MemoryLayout {
    /// Checks the regions.
    ///
    /// # Errors
    /// [`LayoutError`] names the first field that is wrong.
    pub fn new(regions: Vec<Region>) -> Result<Self, LayoutError> {
        let wrong = |index: usize, name: &str, message: String| LayoutError {
            field: format!("regions[{index}].{name}"),
            message,
        };
        if regions.is_empty() {
            return Err(LayoutError { field: "regions".into(), message: "is empty".into() });
        }
        let mut free_from = 0u64;
        for (index, region) in regions.iter().enumerate() {
            let page = region.page_size;
            if ![4 << 10, 2 << 20, 1 << 30].contains(&page) {
                return Err(wrong(index, "page_size", format!("{page} is not 4096, 2 MiB or 1 GiB")));
            }
            if region.size == 0 || !region.size.is_multiple_of(page) {
                let message = format!("{:#x} is not a positive multiple of page_size {page:#x}", region.size);
                return Err(wrong(index, "size", message));
            }
            if !region.gpa.0.is_multiple_of(page) {
                return Err(wrong(index, "gpa", format!("{:#x} is not aligned to {page:#x}", region.gpa.0)));
            }
            if region.gpa.0 < free_from {
                let message = format!("{:#x} lies below {free_from:#x}, the end of the region before", region.gpa.0);
                return Err(wrong(index, "gpa", message));
            }
            free_from =
                region.gpa.0.checked_add(region.size).ok_or_else(|| wrong(index, "size", "ends beyond 2^64".into()))?;
        }
        Ok(Self { regions })
    }

    /// The same memory in pages of another size, a divisor of every page size.
    pub fn in_pages_of(&self, page_size: u64) -> Self {
        Self { regions: self.regions.iter().map(|region| Region { page_size, ..*region }).collect() }
    }

    /// The regions in ascending GPA order.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Pages of all regions.
    pub fn total_pages(&self) -> u64 {
        self.regions.iter().map(Region::pages).sum()
    }

    /// The page that holds `gpa`, if any does.
    pub fn page_of(&self, gpa: Gpa) -> Option<PageId> {
        self.regions.iter().zip(0u32..).find_map(|(region, number)| {
            let offset = gpa.0.checked_sub(region.gpa.0)?;
            (offset < region.size).then(|| PageId { region: number, page: offset / region.page_size })
        })
    }

    /// The pages that a memory error covers: all that the aligned block of `1 << lsb` bytes around `gpa` touches. An
    /// `lsb` below 12 counts as 12: no page is smaller (Intel SDM vol. 3B, 17.3.2.4).
    pub fn pages_of_block(&self, gpa: Gpa, lsb: u32) -> Vec<PageId> {
        let last = 1u64.checked_shl(lsb.max(12)).map_or(u64::MAX, |block| block - 1);
        let (start, end) = (gpa.0 & !last, gpa.0 | last);
        let mut pages = Vec::new();
        for (region, number) in self.regions.iter().zip(0u32..) {
            let (from, to) = (start.max(region.gpa.0), end.min(region.gpa.0 + (region.size - 1)));
            if from <= to {
                let index = |at: u64| (at - region.gpa.0) / region.page_size;
                pages.extend((index(from)..=index(to)).map(|page| PageId { region: number, page }));
            }
        }
        pages
    }

    /// The GPA of a page's first byte; `None` outside the layout.
    pub fn gpa_of(&self, id: PageId) -> Option<Gpa> {
        let region = self.regions.get(id.region as usize)?;
        (id.page < region.pages()).then(|| Gpa(region.gpa.0 + id.page * region.page_size))
    }

    /// Whether the half-open run lies in its region and is not empty.
    pub fn contains(&self, region: u32, page: u64, count: u64) -> bool {
        let end = page.checked_add(count);
        self.regions.get(region as usize).is_some_and(|r| count > 0 && end.is_some_and(|end| end <= r.pages()))
    }
}

impl TryFrom<&proto::MemoryLayout> for MemoryLayout {
    type Error = LayoutError;

    fn try_from(layout: &proto::MemoryLayout) -> Result<Self, LayoutError> {
        let region = |(index, r): (usize, &proto::MemoryRegion)| {
            let backing = match r.backing() {
                proto::Backing::Anonymous => Backing::Anonymous,
                proto::Backing::Memfd => Backing::Memfd,
                proto::Backing::Unspecified => {
                    return Err(LayoutError {
                        field: format!("regions[{index}].backing"),
                        message: format!("{} is neither ANONYMOUS nor MEMFD", r.backing),
                    });
                }
            };
            Ok(Region { gpa: Gpa(r.gpa), size: r.size, page_size: r.page_size, backing })
        };
        let regions: Result<Vec<_>, _> = layout.regions.iter().enumerate().map(region).collect();
        Self::new(regions?)
    }
}

#[cfg(test)]
mod tests;
