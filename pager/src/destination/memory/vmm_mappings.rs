//! The VMM's page tables, as proof that a page is mapped.
//!
//! `EEXIST` proves nothing by itself. `UFFDIO_COPY` on hugetlb also gives it where the pool, or the cgroup of the pager,
//! has no huge page left (`hugetlb_mfill_atomic_pte`, mm/hugetlb.c), and `UFFDIO_POISON` gives it over a page that the
//! guest can read. The page path asks here only after an `EEXIST`.

use crate::layout::Hva;
use crate::sys::pagemap::{Entry, Pagemap, cannot_be_read};

/// The entry of one page in the VMM's page tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// A page, also one that is swapped out: the guest has contents there.
    Page,
    /// The entry of a bad frame: the guest takes a machine check of the host's. Or a marker, where page tables do not
    /// show which.
    BadFrame,
    /// A poison marker. Page tables show none of a huge page: it looks like [`Self::Nothing`].
    Marker,
    /// Nothing, as far as can be seen.
    Nothing,
}

/// The page tables of the VMM.
#[derive(Debug, Clone, Copy)]
pub struct VmmMappings {
    pid: u32,
}

impl VmmMappings {
    /// Those of process `pid`.
    pub fn new(pid: u32) -> Self {
        Self { pid }
    }

    /// The entry of the page at `hva`. Page tables that cannot be read prove nothing.
    pub fn at(self, hva: Hva, page_size: u64) -> Mapping {
        let entries = Pagemap::open(self.pid, hva, page_size).and_then(|pagemap| pagemap.entries(0, 1));
        match entries {
            Ok(entries) => match entries.first() {
                Some(entry) if entry.may_have_contents() => {
                    if cannot_be_read(self.pid, hva.0) {
                        Mapping::BadFrame
                    } else {
                        Mapping::Page
                    }
                }
                Some(Entry::PoisonMarker) => Mapping::Marker,
                _ => Mapping::Nothing,
            },
            Err(error) => {
                tracing::warn!(%error, hva = hva.0, "pager.mapping_unknown");
                Mapping::Nothing
            }
        }
    }
}
