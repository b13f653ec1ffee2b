//! Guest memory, mapped in this process until its last owner drops it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use crate::huge_pages;
use crate::layout::{self, Backing, LayoutError, PAGE_SIZE, RegionSpec};
use crate::machine::{MappedRegion, Ram};

/// Alignment of a transparent huge page, bytes.
const THP_BYTES: usize = 2 << 20;

/// Whether the kernel may put transparent huge pages under pages of 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transparent {
    /// Never: a poison marker and a page that arrives alone are 4 KiB each, and stay so.
    Never,
    /// Wherever it can, from the first touch on (`MADV_HUGEPAGE`): a guest that boots here.
    AtOnce,
    /// Only by a later collapse: a destination's pages arrive one by one.
    Afterwards,
}

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
    /// The host has too few huge pages.
    #[error("{0}")]
    TooFewHugePages(String),
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
    ram: Ram,
    transparent: Transparent,
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
    /// Maps the regions, without transparent huge pages; no page of them is present.
    ///
    /// # Errors
    /// [`MemoryError`]; mappings from before the failure are removed.
    pub fn new(specs: &[RegionSpec]) -> Result<Self, MemoryError> {
        Self::with_transparent(specs, Transparent::Never)
    }

    /// The same, with a choice.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_transparent(specs: &[RegionSpec], transparent: Transparent) -> Result<Self, MemoryError> {
        layout::check(specs)?;
        // Huge pages are set aside: they do not count as available.
        let of_4k = specs.iter().filter(|r| r.page_size == PAGE_SIZE);
        let asked = of_4k.map(|r| r.size).fold(0, u64::saturating_add);
        match available_bytes() {
            Some(available) if available < asked => return Err(MemoryError::TooLittle { asked, available }),
            _ => {}
        }
        let regions = specs.iter().map(|spec| Region::map(spec, transparent)).collect::<Result<Vec<_>, _>>()?;
        let mapped = |r: &Region| MappedRegion { gpa: r.spec.gpa, hva: r.hva, size: r.spec.size };
        let ram = Ram {
            regions: regions.iter().map(mapped).collect(),
            page_sizes: regions.iter().map(|r| r.spec.page_size).collect(),
        };
        Ok(Self { regions, ram, transparent })
    }

    /// The regions, ascending by GPA.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Where the regions are mapped.
    pub fn mapped(&self) -> Arc<[MappedRegion]> {
        Arc::clone(&self.ram.regions)
    }

    /// The memory under a machine.
    pub fn ram(&self) -> Ram {
        self.ram.clone()
    }

    /// Whether it is to be collapsed into transparent huge pages once every page is there.
    pub fn is_to_be_collapsed(&self) -> bool {
        self.transparent == Transparent::Afterwards
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
    fn map(spec: &RegionSpec, transparent: Transparent) -> Result<Self, MemoryError> {
        let refused = |call| move || MemoryError::Refused { call, size: spec.size, source: io::Error::last_os_error() };
        let file = match spec.backing {
            Backing::Anonymous => None,
            Backing::Memfd => Some(memfd(spec)?),
        };
        let kind = match file {
            None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            Some(_) => libc::MAP_SHARED,
        };
        let fd = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let size = usize::try_from(spec.size).map_err(|_| refused("mmap")())?;
        if spec.page_size != PAGE_SIZE {
            // Without MAP_NORESERVE: a shortage shows here, and not as a SIGBUS of the first touch.
            let flags = kind | libc::MAP_HUGETLB | huge_pages::size_flag(spec.page_size) as i32;
            let at = map_anywhere(size, flags, fd).map_err(|source| too_few(spec, "mmap", source))?;
            return Ok(Self { spec: *spec, hva: at as u64, file });
        }
        let flags = kind | libc::MAP_NORESERVE;
        if transparent == Transparent::Never {
            let at = map_anywhere(size, flags, fd).map_err(|_| refused("mmap")())?;
            let region = Self { spec: *spec, hva: at as u64, file };
            advise(at, size, libc::MADV_NOHUGEPAGE).map_err(|_| refused("madvise(MADV_NOHUGEPAGE)")())?;
            return Ok(region);
        }
        let at = map_aligned(size, flags, fd).map_err(|_| refused("mmap")())?;
        let region = Self { spec: *spec, hva: at as u64, file };
        if transparent == Transparent::AtOnce {
            advise(at, size, libc::MADV_HUGEPAGE).map_err(|_| refused("madvise(MADV_HUGEPAGE)")())?;
        }
        Ok(region)
    }
}

/// EINVAL: a kernel without transparent huge pages, where there is nothing to ask for or to forbid.
fn advise(at: *mut libc::c_void, size: usize, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: the advice concerns a mapping of this module's and changes no content.
    match unsafe { libc::madvise(at, size, advice) } {
        0 => Ok(()),
        _ => Some(io::Error::last_os_error()).filter(|e| e.raw_os_error() != Some(libc::EINVAL)).map_or(Ok(()), Err),
    }
}

fn map_anywhere(size: usize, flags: libc::c_int, fd: libc::c_int) -> io::Result<*mut libc::c_void> {
    // SAFETY: a fresh mapping at an address of the kernel's choice; it touches nothing that exists.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at) }
}

/// At an address where transparent huge pages fit.
fn map_aligned(size: usize, flags: libc::c_int, fd: libc::c_int) -> io::Result<*mut libc::c_void> {
    let reserved = size + THP_BYTES;
    // SAFETY: as in `map_anywhere`: room without access, to choose the address in.
    let room = unsafe {
        libc::mmap(std::ptr::null_mut(), reserved, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    if room == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let before = room as usize;
    let begin = before.next_multiple_of(THP_BYTES);
    let (end, after) = (begin + size, before + reserved);
    // SAFETY: all three calls stay within `room`, which is this function's own and which nobody knows yet.
    unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let at = libc::mmap(begin as *mut libc::c_void, size, protection, flags | libc::MAP_FIXED, fd, 0);
        if at == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            libc::munmap(room, reserved);
            return Err(error);
        }
        if begin > before {
            libc::munmap(room, begin - before);
        }
        if after > end {
            libc::munmap(end as *mut libc::c_void, after - end);
        }
        Ok(at)
    }
}

/// ENOMEM: not enough huge pages are free. ENODEV, EINVAL: the host knows no pages of that size.
fn too_few(spec: &RegionSpec, call: &'static str, source: io::Error) -> MemoryError {
    match source.raw_os_error() {
        Some(libc::ENOMEM | libc::ENODEV | libc::EINVAL) => {
            MemoryError::TooFewHugePages(huge_pages::shortage(spec.page_size, spec.size))
        }
        _ => MemoryError::Refused { call, size: spec.size, source },
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: this region owns the mapping; owners of addresses into it are gone (see `GuestMemory`).
        unsafe { libc::munmap(self.hva as *mut libc::c_void, self.spec.size as usize) };
    }
}

fn memfd(spec: &RegionSpec) -> Result<File, MemoryError> {
    let huge = match spec.page_size {
        PAGE_SIZE => 0,
        page_size => libc::MFD_HUGETLB | huge_pages::size_flag(page_size),
    };
    // SAFETY: the name is a NUL-terminated constant.
    let fd = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC | huge) };
    if fd < 0 {
        let source = io::Error::last_os_error();
        return Err(match huge {
            0 => MemoryError::Refused { call: "memfd_create", size: spec.size, source },
            _ => too_few(spec, "memfd_create", source),
        });
    }
    // SAFETY: the descriptor was just made and is owned by nobody else.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(spec.size).map_err(|source| MemoryError::Refused { call: "ftruncate", size: spec.size, source })?;
    Ok(file)
}

/// `MemAvailable` of /proc/meminfo in bytes; `None` where it cannot be read.
fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests;
