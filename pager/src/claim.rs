//! Pages that a lane has claimed, on their way to where the VMM finds them: INSTALLING, so that until the claim is settled
//! nobody else asks for them, installs them or changes their state, and the lock need not be held.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use crate::attached::AttachedFile;
use crate::landing::{Landing, Places};
use crate::lane::{MOST_PAGES, PAGE};
use crate::page_table::Arrival;
use crate::placement::PageIndex;
use crate::region_map::Hva;
use crate::userfaultfd::{Stop, Userfaultfd};

/// Pages that are installed by one call: who waits for one of them is woken behind it.
const FEW: u64 = 16;

/// How contents come to where the VMM finds them.
#[derive(Debug, Clone)]
pub enum Way {
    /// They are received there, in a mapping that stays meanwhile.
    Received(Arc<Landing>),
    /// They are written to a file, in which the first page has this offset.
    Written(Arc<AttachedFile>, u64),
    /// They are copied.
    Copied,
}

/// At most [`MOST_PAGES`] pages of 4 KiB, of which those are claimed that were wanted.
#[derive(Debug)]
pub struct Claim {
    first: PageIndex,
    count: u64,
    /// Bit `n`: the `n`-th page is claimed, and not installed yet.
    wanted: u64,
    /// It is installed.
    installed: u64,
    arrival: Arrival,
    uffd: Arc<Userfaultfd>,
    /// Of the first page.
    hva: Hva,
    way: Way,
    began: Instant,
}

const _: () = assert!(MOST_PAGES <= u64::BITS as u64);

impl Claim {
    /// Of `count` pages from `first` on, which is at `hva`; `take` claims each, or says that it is not wanted.
    pub fn new(
        (first, count, hva): (PageIndex, u64, Hva),
        (uffd, way): (Arc<Userfaultfd>, Way),
        arrival: Arrival,
        mut take: impl FnMut(PageIndex) -> bool,
    ) -> Self {
        let wanted = (0..count).fold(0, |wanted, n| wanted | u64::from(take(PageIndex(first.0 + n))) << n);
        Self { first, count, wanted, installed: 0, arrival, uffd, hva, way, began: Instant::now() }
    }

    /// Where the pages' bytes are to be received: those that are claimed from `at` on, each other one at its place in
    /// `elsewhere`, which has room for all.
    pub fn places(&self, at: *mut u8, elsewhere: &mut [u8], places: &mut Places) {
        places.clear();
        for (n, elsewhere) in elsewhere.chunks_exact_mut(PAGE as usize).take(self.count as usize).enumerate() {
            let place =
                if self.wanted >> n & 1 == 1 { at.wrapping_add(n * PAGE as usize) } else { elsewhere.as_mut_ptr() };
            places.then(place, PAGE as usize);
        }
    }

    /// Installs what is claimed, and wakes who waits on it; `contents` of all the pages, where they are not received in
    /// place. After a stop the first [`Self::dealt`] are installed, or not wanted.
    pub fn install(&mut self, contents: &[u8]) -> Option<Stop> {
        self.began = Instant::now();
        while let Some((n, count)) = first_run(self.wanted) {
            let count = count.min(FEW);
            let (reached, stop) = self.install_run(n, count, contents);
            for n in n..n + reached {
                self.wanted &= !(1 << n);
                self.installed |= 1 << n;
            }
            if stop.is_some() {
                return stop;
            }
        }
        None
    }

    fn install_run(&self, n: u64, count: u64, contents: &[u8]) -> (u64, Option<Stop>) {
        let (hva, size) = (Hva(self.hva.0 + n * PAGE), count * PAGE);
        let bytes = || &contents[(n * PAGE) as usize..][..size as usize];
        let progress = match &self.way {
            Way::Received(_) => self.uffd.map(hva, size),
            Way::Copied => self.uffd.copy(hva, bytes()),
            Way::Written(file, offset) => match write(file, offset + n * PAGE, bytes()) {
                Ok(()) => self.uffd.map(hva, size),
                Err(stop) => return (0, Some(stop)),
            },
        };
        let reached = progress.done / PAGE;
        if progress.stop == Some(Stop::AlreadyPresent) {
            // Installed by a pager that died before it could say so. EEXIST wakes nobody.
            let _ = self.uffd.wake(Hva(hva.0 + progress.done), PAGE);
            return (reached + 1, None);
        }
        (reached, progress.stop)
    }

    /// So many of the first pages need nothing more.
    pub fn dealt(&self) -> u64 {
        u64::from(self.wanted.trailing_zeros()).min(self.count)
    }

    /// What is installed, as half-open runs.
    pub fn installed(&self) -> impl Iterator<Item = (PageIndex, PageIndex)> + '_ {
        let mut left = self.installed;
        std::iter::from_fn(move || {
            let (n, count) = first_run(left)?;
            (n..n + count).for_each(|n| left &= !(1 << n));
            Some((PageIndex(self.first.0 + n), PageIndex(self.first.0 + n + count)))
        })
    }

    /// What is not.
    pub fn left(&self) -> impl Iterator<Item = PageIndex> + '_ {
        (0..self.count).filter(|n| self.wanted >> n & 1 == 1).map(|n| PageIndex(self.first.0 + n))
    }

    /// How it comes.
    pub fn arrival(&self) -> Arrival {
        self.arrival
    }

    /// Whoever faulted on an installed page and was read before then was woken.
    pub fn began(&self) -> Instant {
        self.began
    }
}

/// Number and length of the first run of ones.
fn first_run(bits: u64) -> Option<(u64, u64)> {
    let skipped = bits.trailing_zeros();
    let run = bits.checked_shr(skipped)?.trailing_ones();
    Some((skipped.into(), run.into()))
}

/// Writes pages to their file. Nobody sees them before they are mapped.
fn write(file: &AttachedFile, mut at: u64, mut bytes: &[u8]) -> Result<(), Stop> {
    while !bytes.is_empty() {
        // SAFETY: the kernel reads at most `bytes`.
        let n = unsafe { libc::pwrite(file.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), at as libc::off_t) };
        match usize::try_from(n) {
            Ok(n) => (bytes, at) = (&bytes[n..], at + n as u64),
            Err(_) => match std::io::Error::last_os_error().raw_os_error().unwrap_or(0) {
                libc::EINTR => {}
                libc::ENOMEM | libc::ENOSPC => return Err(Stop::NoMemory),
                errno => return Err(Stop::Refused(errno)),
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_first_run_of_ones_is_found(bits: u64) {
            let ones: Vec<u64> = (0..64).filter(|n| bits >> n & 1 == 1).collect();
            let found = first_run(bits);
            prop_assert_eq!(found.is_none(), ones.is_empty());
            if let Some((n, count)) = found {
                prop_assert_eq!(n, ones[0]);
                prop_assert!((n..n + count).all(|n| bits >> n & 1 == 1));
                prop_assert!(n + count == 64 || bits >> (n + count) & 1 == 0);
            }
        }
    }
}
