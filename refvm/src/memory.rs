//! Guest memory in this process: mapped here, unmapped when the last owner lets go.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use crate::layout::{self, Backing, LayoutError, RegionSpec};
use crate::machine::MappedRegion;

/// Why there is no memory for the guest.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The layout is wrong or not supported.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The host has less than was asked for.
    #[error("{asked} bytes of guest memory asked for, {available} available on this host")]
    TooLittle {
        /// Bytes.
        asked: u64,
        /// `MemAvailable` of /proc/meminfo, bytes.
        available: u64,
    },
    /// A call was refused by the kernel.
    #[error("{call} of {size} bytes: {source}")]
    Refused {
        /// The system call.
        call: &'static str,
        /// Bytes.
        size: u64,
        /// Its error.
        source: io::Error,
    },
}

/// The memory of one guest. Dropping it unmaps it; machines and readers that only know addresses must be gone by then.
#[derive(Debug)]
pub struct GuestMemory {
    regions: Vec<Region>,
    mapped: Arc<[MappedRegion]>,
}

/// One mapped region.
#[derive(Debug)]
pub struct Region {
    /// As asked for.
    pub spec: RegionSpec,
    /// Where it is mapped.
    pub hva: u64,
    /// The memfd behind it, from its offset 0.
    pub file: Option<File>,
}

impl GuestMemory {
    /// Maps the regions; no page of them is present.
    ///
    /// # Errors
    /// [`MemoryError`]; whatever was mapped before the failure is unmapped.
    pub fn new(specs: &[RegionSpec]) -> Result<Self, MemoryError> {
        layout::check(specs)?;
        let asked = specs.iter().map(|r| r.size).fold(0, u64::saturating_add);
        match available_bytes() {
            Some(available) if available < asked => return Err(MemoryError::TooLittle { asked, available }),
            _ => {}
        }
        let regions = specs.iter().map(Region::map).collect::<Result<Vec<_>, _>>()?;
        let mapped = regions.iter().map(|r| MappedRegion { gpa: r.spec.gpa, hva: r.hva, size: r.spec.size }).collect();
        Ok(Self { regions, mapped })
    }

    /// The regions, ascending by GPA.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// What machines are made over.
    pub fn mapped(&self) -> Arc<[MappedRegion]> {
        Arc::clone(&self.mapped)
    }

    /// The layout, as asked for.
    pub fn specs(&self) -> Vec<RegionSpec> {
        self.regions.iter().map(|r| r.spec).collect()
    }
}

/// Where `gpa` is mapped; `None` outside the guest's memory.
pub fn hva_of(regions: &[MappedRegion], gpa: u64) -> Option<u64> {
    regions.iter().find_map(|r| {
        let offset = gpa.checked_sub(r.gpa)?;
        (offset < r.size).then(|| r.hva + offset)
    })
}

impl Region {
    fn map(spec: &RegionSpec) -> Result<Self, MemoryError> {
        let refused = |call| move || MemoryError::Refused { call, size: spec.size, source: io::Error::last_os_error() };
        let file = match spec.backing {
            Backing::Anonymous => None,
            Backing::Memfd => Some(memfd(spec.size)?),
        };
        let flags = match file {
            None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            Some(_) => libc::MAP_SHARED | libc::MAP_NORESERVE,
        };
        let fd = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let size = usize::try_from(spec.size).map_err(|_| refused("mmap")())?;
        // SAFETY: a fresh mapping at an address of the kernel's choice; it touches nothing that exists.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
        if at == libc::MAP_FAILED {
            return Err(refused("mmap")());
        }
        let region = Self { spec: *spec, hva: at as u64, file };
        // A poison marker and a page that arrives alone are 4 KiB each: pages must never be collapsed into huge ones.
        // EINVAL: a kernel without transparent huge pages, where there is nothing to forbid.
        // SAFETY: the advice concerns the mapping made above and changes no content.
        if unsafe { libc::madvise(at, size, libc::MADV_NOHUGEPAGE) } != 0
            && io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL)
        {
            return Err(refused("madvise(MADV_NOHUGEPAGE)")());
        }
        Ok(region)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: this region owns the mapping; owners of addresses into it are gone (see `GuestMemory`).
        unsafe { libc::munmap(self.hva as *mut libc::c_void, self.spec.size as usize) };
    }
}

fn memfd(size: u64) -> Result<File, MemoryError> {
    let refused = |call| MemoryError::Refused { call, size, source: io::Error::last_os_error() };
    // SAFETY: the name is a NUL-terminated constant.
    let fd = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(refused("memfd_create"));
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(size).map_err(|source| MemoryError::Refused { call: "ftruncate", size, source })?;
    Ok(file)
}

/// `MemAvailable` of /proc/meminfo in bytes; `None` where it cannot be read.
fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::split;

    #[test]
    fn both_backings_read_as_zeros_and_keep_what_is_written() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let memory = GuestMemory::new(&split(64 << 20, 2, backing).unwrap()).unwrap();
            assert_eq!(memory.regions().len(), 2);
            for region in memory.regions() {
                let last = (region.hva + region.spec.size - 8) as *mut u64;
                // SAFETY: inside the region, which is mapped and used by nobody else.
                unsafe {
                    assert_eq!(last.read_volatile(), 0);
                    last.write_volatile(7);
                    assert_eq!(last.read_volatile(), 7);
                }
                assert_eq!(region.file.is_some(), backing == Backing::Memfd);
            }
        }
    }

    #[test]
    fn more_than_the_host_has_is_refused_with_both_figures() {
        let specs = split(1 << 50, 1, Backing::Anonymous).unwrap();
        let refused = GuestMemory::new(&specs).unwrap_err();
        assert!(matches!(refused, MemoryError::TooLittle { asked, available } if asked == 1 << 50 && available > 0));
    }

    #[test]
    fn addresses_are_found_across_the_hole() {
        let regions = [
            MappedRegion { gpa: 0, hva: 0x1000, size: 0x2000 },
            MappedRegion { gpa: 0x10000, hva: 0x9000, size: 0x1000 },
        ];
        assert_eq!(hva_of(&regions, 0x1fff), Some(0x2fff));
        assert_eq!(hva_of(&regions, 0x2000), None);
        assert_eq!(hva_of(&regions, 0x10000), Some(0x9000));
    }
}
