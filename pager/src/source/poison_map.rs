//! The poisoned pages that this source knows of, by a report or by a read. No page is ever taken out.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::layout::PageId;
use crate::layout::page_run::PoisonInfo;

/// Known poison by page.
#[derive(Debug, Default)]
pub(super) struct PoisonMap {
    pages: BTreeMap<PageId, PoisonInfo>,
}

impl PoisonMap {
    /// Adds a page. Earlier knowledge of it stays; a page that the guest has seen stays seen. Returns whether it is
    /// new.
    pub fn add(&mut self, id: PageId, poison: PoisonInfo) -> bool {
        let known = self.pages.contains_key(&id);
        let entry = self.pages.entry(id).or_insert(poison);
        entry.guest_visible |= poison.guest_visible;
        !known
    }

    /// The first known page of a run, with its record.
    pub fn first_in(&self, region: u32, pages: Range<u64>) -> Option<(u64, PoisonInfo)> {
        let at = |page| PageId { region, page };
        self.pages.range(at(pages.start)..at(pages.end)).next().map(|(id, poison)| (id.page, *poison))
    }
}

#[cfg(test)]
mod tests;
