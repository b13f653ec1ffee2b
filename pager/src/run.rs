//! Runs of pages as they arrive from the source, checked against the layout.

use bytes::Bytes;

use crate::page_table::Arrival;
use crate::placement::{Numbering, PageIndex};
use crate::proto::{self, ErrorOrigin, run::Contents as Wire};
use crate::region_map::PageId;

/// On which lane a run came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// The urgent lane.
    Demand,
    /// A bulk lane.
    Push,
}

/// What the source knows of a bad page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoisonNote {
    /// How it was found.
    pub origin: ErrorOrigin,
    /// The guest was given a machine check for it.
    pub guest_visible: bool,
    /// Migrations that the error has travelled through.
    pub hop: u32,
}

/// What a run holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Contents {
    /// `count` pages.
    Data(Bytes),
    /// Zeros, or a hole.
    Zero,
    /// Bad pages.
    Poison(PoisonNote),
}

/// Consecutive pages of one region that have arrived and are not yet dealt with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRun {
    /// The next page to deal with.
    pub first: PageIndex,
    /// Pages left.
    pub count: u64,
    /// Bytes a page.
    pub page_size: u64,
    /// What they hold.
    pub contents: Contents,
    /// How they came.
    pub lane: Lane,
}

impl PageRun {
    /// Checks a run of the source.
    ///
    /// # Errors
    /// What is wrong, for people: the source speaks nonsense and cannot be trusted further.
    pub fn checked(run: proto::Run, numbering: &Numbering, lane: Lane) -> Result<Self, String> {
        let (region, page, count) = (run.region, run.page, run.count);
        let what = || format!("the source sent region {region} pages {page}+{count}");
        let first =
            numbering.index_of(PageId { region, page }).ok_or_else(|| format!("{} outside the layout", what()))?;
        let of = numbering.region_of(first).ok_or_else(|| format!("{} outside the layout", what()))?;
        if count == 0 || count > of.end().0 - first.0 {
            return Err(format!("{} outside the layout", what()));
        }
        let page_size = of.region.page_size;
        let contents = match run.contents {
            Some(Wire::Data(data)) if count.checked_mul(page_size) == Some(data.len() as u64) => Contents::Data(data),
            Some(Wire::Data(data)) => return Err(format!("{} with {} bytes", what(), data.len())),
            Some(Wire::Zero(_)) => Contents::Zero,
            Some(Wire::Poison(p)) => {
                let (origin, guest_visible, hop) = (p.origin(), p.guest_visible, p.hop);
                Contents::Poison(PoisonNote { origin, guest_visible, hop })
            }
            None => return Err(format!("{} with no contents", what())),
        };
        Ok(Self { first, count, page_size, contents, lane })
    }

    /// How a page of it counts once it is there.
    pub fn arrival(&self) -> Arrival {
        match (&self.contents, self.lane) {
            (Contents::Data(_), Lane::Demand) => Arrival::Demand,
            (Contents::Data(_), Lane::Push) => Arrival::Push,
            _ => Arrival::Zero,
        }
    }

    /// The first `pages` are dealt with.
    pub fn advance(&mut self, pages: u64) {
        let pages = pages.min(self.count);
        self.first = PageIndex(self.first.0 + pages);
        self.count -= pages;
        if let Contents::Data(data) = &mut self.contents {
            *data = data.slice((pages * self.page_size) as usize..);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region_map::{Backing, Gpa, Layout, Region};

    fn numbering() -> Numbering {
        let region = Region { gpa: Gpa(0), size: 4 << 12, page_size: 4096, backing: Backing::Memfd };
        Numbering::new(&Layout::new(vec![region]).unwrap())
    }

    fn run(page: u64, count: u64, contents: Option<Wire>) -> proto::Run {
        proto::Run { region: 0, page, count, contents }
    }

    #[test]
    fn a_run_goes_on_behind_what_is_dealt_with() {
        let data = [[1u8; 4096], [2u8; 4096]].concat();
        let mut run = PageRun::checked(run(1, 2, Some(Wire::Data(data.into()))), &numbering(), Lane::Push).unwrap();
        run.advance(1);
        assert_eq!((run.first, run.count, run.arrival()), (PageIndex(2), 1, Arrival::Push));
        assert!(matches!(&run.contents, Contents::Data(d) if d.len() == 4096 && d[0] == 2));
        run.advance(9);
        assert_eq!(run.count, 0);
    }

    #[test]
    fn nonsense_is_refused() {
        let zero = || Some(Wire::Zero(proto::Zero {}));
        for bad in [
            run(0, 0, zero()),
            run(4, 1, zero()),
            run(3, 2, zero()),
            run(1, u64::MAX, zero()),
            run(0, 1, None),
            run(0, 2, Some(Wire::Data(vec![0; 4096].into()))),
        ] {
            assert!(PageRun::checked(bad.clone(), &numbering(), Lane::Demand).is_err(), "{bad:?}");
        }
    }
}
