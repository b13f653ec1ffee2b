//! Huge pages of this host (Documentation/admin-guide/mm/hugetlbpage.rst): flags that request them, and the message if
//! there are too few.

use std::fs;
use std::path::{Path, PathBuf};

/// Where the kernel has a directory for each size of huge pages.
const POOLS: &str = "/sys/kernel/mm/hugepages";
/// Both `mmap(2)` and `memfd_create(2)` take log2 of the page size from this bit on (`HUGETLB_FLAG_ENCODE_SHIFT`).
const SIZE_SHIFT: u32 = 26;

/// The flag for a size of huge pages, in addition to `MAP_HUGETLB` or `MFD_HUGETLB`.
pub fn size_flag(page_size: u64) -> u32 {
    page_size.trailing_zeros() << SIZE_SHIFT
}

/// Huge pages of one size, as the host has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    page_size: u64,
    /// `nr_hugepages`.
    total: u64,
    /// `free_hugepages`, less those that others have reserved.
    free: u64,
    /// The file that sets the number.
    setting: String,
}

impl Pool {
    /// `None`: this host has no pages of that size.
    pub fn of_host(page_size: u64) -> Option<Self> {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let default = meminfo.lines().find_map(|line| line.strip_prefix("Hugepagesize:"));
        let default_kib = default.and_then(|text| text.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        Self::read(Path::new(POOLS), page_size, default_kib.map(|kib| kib << 10))
    }

    fn read(pools: &Path, page_size: u64, default: Option<u64>) -> Option<Self> {
        let pool: PathBuf = pools.join(format!("hugepages-{}kB", page_size >> 10));
        let number = |name| fs::read_to_string(pool.join(name)).ok()?.trim().parse::<u64>().ok();
        let free = number("free_hugepages")?.saturating_sub(number("resv_hugepages")?);
        let setting = match default {
            Some(size) if size == page_size => "vm.nr_hugepages".into(),
            _ => format!("{}/nr_hugepages", pool.display()),
        };
        Some(Self { page_size, total: number("nr_hugepages")?, free, setting })
    }

    /// The host's shortage for `size` bytes, and its remedy.
    pub fn shortage(&self, size: u64) -> String {
        let wanted = size / self.page_size;
        let needed = self.total + wanted.saturating_sub(self.free);
        let make = match self.setting.strip_prefix("vm.") {
            Some(_) => format!("sysctl {}={needed}", self.setting),
            None => format!("echo {needed} > {}", self.setting),
        };
        let mib = self.page_size >> 20;
        format!(
            "{wanted} huge pages of {mib} MiB are needed, {} of {} are free on this host; set more aside: {make}",
            self.free, self.total
        )
    }
}

/// Why this host has no `size` bytes in pages of `page_size`.
pub fn shortage(page_size: u64, size: u64) -> String {
    Pool::of_host(page_size).map_or_else(
        || format!("this host has no pages of {} MiB (none in {POOLS})", page_size >> 20),
        |pool| pool.shortage(size),
    )
}

#[cfg(test)]
mod tests;
