//! The pages that this source knows to be poisoned: told of, or found by reading. Nothing is ever taken out.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::proto;
use crate::region_map::{Gpa, Layout, PageId};

/// Known poison by page.
#[derive(Debug, Default)]
pub(super) struct PoisonMap {
    pages: BTreeMap<PageId, proto::Poison>,
}

impl PoisonMap {
    /// Adds a page; what is known of it already stays, but that the guest has seen it is never forgotten.
    /// Returns whether it is new.
    pub fn add(&mut self, id: PageId, poison: proto::Poison) -> bool {
        let known = self.pages.contains_key(&id);
        let entry = self.pages.entry(id).or_insert(poison);
        entry.guest_visible |= poison.guest_visible;
        !known
    }

    /// The first known page of a run, with what is known.
    pub fn first_in(&self, region: u32, pages: Range<u64>) -> Option<(u64, proto::Poison)> {
        let at = |page| PageId { region, page };
        self.pages.range(at(pages.start)..at(pages.end)).next().map(|(id, poison)| (id.page, *poison))
    }
}

/// The pages of the layout that a memory error covers: all that its `1 << lsb` bytes touch.
pub(super) fn pages_of(layout: &Layout, error: &proto::MemoryError) -> Vec<PageId> {
    let block = 1u64 << error.lsb.clamp(12, 40);
    let start = error.gpa & !(block - 1);
    let mut pages = Vec::new();
    let mut at = start;
    while at < start + block {
        match layout.page_of(Gpa(at)) {
            Some(id) => {
                pages.push(id);
                let region = &layout.regions()[id.region as usize];
                at = region.gpa.0 + (id.page + 1) * region.page_size;
            }
            None => at += 4096,
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region_map::{Backing, Region};

    fn poison(guest_visible: bool) -> proto::Poison {
        proto::Poison { origin: proto::ErrorOrigin::Vmm.into(), guest_visible, hop: 0 }
    }

    #[test]
    fn what_the_guest_has_seen_is_never_forgotten() {
        let mut map = PoisonMap::default();
        let id = PageId { region: 0, page: 7 };
        assert!(map.add(id, poison(true)));
        assert!(!map.add(id, poison(false)));
        assert_eq!(map.first_in(0, 0..100), Some((7, poison(true))));
        assert_eq!(map.first_in(0, 8..100), None);
        assert_eq!(map.first_in(1, 0..100), None);
    }

    #[test]
    fn an_error_covers_every_page_of_its_block() {
        let region = |gpa, size| Region { gpa: Gpa(gpa), size, page_size: 4096, backing: Backing::Memfd };
        let layout = Layout::new(vec![region(0, 1 << 20), region(2 << 20, 1 << 20)]).unwrap();
        let error = |gpa, lsb| proto::MemoryError { gpa, lsb, ..Default::default() };
        assert_eq!(pages_of(&layout, &error(0x3abc, 12)), [PageId { region: 0, page: 3 }]);
        assert_eq!(pages_of(&layout, &error(0x3000, 0)), [PageId { region: 0, page: 3 }]);
        assert_eq!(pages_of(&layout, &error(0x20_0000, 21)).len(), 256);
        assert_eq!(pages_of(&layout, &error(0x18_0000, 12)), []);
    }
}
