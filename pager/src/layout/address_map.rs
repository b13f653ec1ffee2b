//! Where each page of a layout is in the VMM's address space, and its number in the page table.

use crate::layout::PAGE_SIZE;
use crate::layout::{Gpa, Hva, MemoryLayout, PageId, Region};

/// Number of a page in the page table: the pages of all regions, counted in the order of the layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

/// The pages of a layout, numbered.
#[derive(Debug, Clone)]
pub struct PageNumbering {
    layout: MemoryLayout,
    regions: Vec<NumberedRegion>,
}

/// One region and the number of its first page.
#[derive(Debug, Clone, Copy)]
pub struct NumberedRegion {
    /// As in the layout.
    pub region: Region,
    /// Number of the region in the layout.
    pub number: u32,
    /// Number of its first page.
    pub first: PageIndex,
}

impl NumberedRegion {
    /// One past the number of its last page.
    pub fn end(&self) -> PageIndex {
        PageIndex(self.first.0 + self.region.pages())
    }

    /// GPA of a page of this region.
    pub fn gpa_of(&self, page: PageIndex) -> Gpa {
        Gpa(self.region.gpa.0 + (page.0 - self.first.0) * self.region.page_size)
    }

    /// Pieces of 4 KiB that a page has.
    pub fn pieces(&self) -> u64 {
        self.region.page_size / PAGE_SIZE
    }

    /// The page that holds piece `piece` of the region, and which of the page's pieces it is.
    pub fn page_of_piece(&self, piece: u64) -> (PageIndex, u64) {
        (PageIndex(self.first.0 + piece / self.pieces()), piece % self.pieces())
    }

    /// log2 of the page size: the `lsb` of a machine check for it.
    pub fn lsb(&self) -> u32 {
        self.region.page_size.trailing_zeros()
    }
}

impl PageNumbering {
    /// Numbers the pages of a layout.
    pub fn new(layout: &MemoryLayout) -> Self {
        let mut next = 0;
        let regions = layout
            .regions()
            .iter()
            .zip(0u32..)
            .map(|(region, number)| {
                let first = PageIndex(next);
                next += region.pages();
                NumberedRegion { region: *region, number, first }
            })
            .collect();
        Self { layout: layout.clone(), regions }
    }

    /// The regions in the order of the layout.
    pub fn regions(&self) -> &[NumberedRegion] {
        &self.regions
    }

    /// The region that holds a page; `None` beyond the last.
    pub fn region_of(&self, page: PageIndex) -> Option<&NumberedRegion> {
        let after = self.regions.partition_point(|r| r.first <= page);
        self.regions.get(after.checked_sub(1)?).filter(|r| page < r.end())
    }

    /// The number of a page; `None` outside the layout.
    pub fn index_of(&self, id: PageId) -> Option<PageIndex> {
        let region = self.regions.get(id.region as usize)?;
        (id.page < region.region.pages()).then(|| PageIndex(region.first.0 + id.page))
    }

    /// The pages that a memory error covers, see [`MemoryLayout::pages_of_block`].
    pub fn pages_of_block(&self, gpa: Gpa, lsb: u32) -> Vec<PageIndex> {
        self.layout.pages_of_block(gpa, lsb).into_iter().filter_map(|id| self.index_of(id)).collect()
    }
}

/// The numbered pages and their addresses in the VMM.
#[derive(Debug, Clone)]
pub struct AddressMap {
    numbering: PageNumbering,
    hvas: Vec<Hva>,
}

impl AddressMap {
    /// `hvas` are those of the regions, in the order of the layout; `None` if their number differs.
    pub fn new(numbering: PageNumbering, hvas: Vec<Hva>) -> Option<Self> {
        (hvas.len() == numbering.regions().len()).then_some(Self { numbering, hvas })
    }

    /// The numbering.
    pub fn numbering(&self) -> &PageNumbering {
        &self.numbering
    }

    /// Address of a page's first byte, and the page's size.
    pub fn address_of(&self, page: PageIndex) -> Option<(Hva, u64)> {
        let region = self.numbering.region_of(page)?;
        let hva = self.hvas.get(region.number as usize)?;
        let size = region.region.page_size;
        Some((Hva(hva.0 + (page.0 - region.first.0) * size), size))
    }

    /// The page at an address.
    pub fn page_at(&self, hva: Hva) -> Option<PageIndex> {
        self.hvas.iter().zip(self.numbering.regions()).find_map(|(base, r)| {
            let offset = hva.0.checked_sub(base.0)?;
            (offset < r.region.size).then(|| PageIndex(r.first.0 + offset / r.region.page_size))
        })
    }

    /// The pages that lie wholly or in part in the half-open range of addresses: half-open runs of page numbers.
    pub fn pages_in(&self, start: Hva, end: Hva) -> Vec<(PageIndex, PageIndex)> {
        let overlap = |(base, r): (&Hva, &NumberedRegion)| {
            let (from, to) = (start.0.max(base.0), end.0.min(base.0 + r.region.size));
            (from < to).then(|| {
                let size = r.region.page_size;
                let first = r.first.0 + (from - base.0) / size;
                (PageIndex(first), PageIndex(r.first.0 + (to - base.0).div_ceil(size)))
            })
        };
        self.hvas.iter().zip(self.numbering.regions()).filter_map(overlap).collect()
    }

    /// First address and size in bytes of each region.
    pub fn ranges(&self) -> impl Iterator<Item = (Hva, u64)> + '_ {
        self.hvas.iter().zip(self.numbering.regions()).map(|(base, r)| (*base, r.region.size))
    }
}

#[cfg(test)]
mod tests;
