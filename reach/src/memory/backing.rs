//! The file behind a mapping: its kind, and a descriptor of it.

use std::fs::File;
use std::os::fd::AsFd;

use rustix::fs::{OFlags, fstat, fstatfs};

use super::mapping::{BASE_PAGE, Mapping};
use crate::error::Error;
use crate::identity::{Process, status_field};
use crate::proto::MappingKind;

/// statfs(2).
const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// Names that the kernel gives to memory that belongs to no file a process could have opened.
const NAMELESS_TMPFS: [&str; 3] = ["/dev/zero (deleted)", "/SYSV", "[anon_shmem"];
const NAMELESS_HUGETLBFS: &str = "/anon_hugepage";

/// Kind and page size of a mapping's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Of memory.
    pub kind: MappingKind,
    /// Bytes.
    pub page_size: u64,
    /// The process's own descriptor of the file.
    pub descriptor: Option<i32>,
}

/// The files that a process has open, to find those that it maps.
#[derive(Debug)]
pub struct OpenFiles<'a> {
    process: &'a Process,
    /// Device, inode, descriptor.
    files: Vec<(u64, u64, i32)>,
}

impl<'a> OpenFiles<'a> {
    /// Looks at all descriptors.
    ///
    /// # Errors
    /// The process has ended, or may not be looked at.
    pub fn read(process: &'a Process) -> Result<Self, Error> {
        let identity = |descriptor: i32| {
            // Closed since the list was made: it does not count.
            let file = process.open(&format!("fd/{descriptor}"), OFlags::PATH).ok()?;
            let stat = fstat(&file).ok()?;
            Some((stat.st_dev, stat.st_ino, descriptor))
        };
        let files = process.numbers("fd")?.into_iter().filter_map(identity).collect();
        Ok(Self { process, files })
    }

    /// Finds the kind and page size of a mapping.
    ///
    /// # Errors
    /// The process has ended, or may not be looked at.
    pub fn backing(&self, mapping: &Mapping) -> Result<Backing, Error> {
        let descriptor = self.descriptor(mapping);
        let backing = |kind, page_size| Backing { kind, page_size, descriptor };
        if mapping.inode == 0 {
            return Ok(backing(MappingKind::Anonymous, BASE_PAGE));
        }
        let file_system = self.look_at(mapping).ok().and_then(|file| fstatfs(&file).ok());
        let (magic, block) = file_system.map_or((0, 0), |found| (found.f_type as u64, found.f_bsize as u64));
        let memfd = mapping.path.starts_with("/memfd:");
        let nameless = NAMELESS_TMPFS.iter().any(|name| mapping.path.starts_with(name));
        match magic {
            HUGETLBFS_MAGIC => Ok(backing(MappingKind::Hugetlbfs, block)),
            _ if mapping.path.starts_with(NAMELESS_HUGETLBFS) => {
                Ok(backing(MappingKind::Hugetlbfs, self.shown_page_size(mapping)?))
            }
            0 if memfd => match self.shown_page_size(mapping)? {
                BASE_PAGE => Ok(backing(MappingKind::Memfd, BASE_PAGE)),
                huge => Ok(backing(MappingKind::Hugetlbfs, huge)),
            },
            TMPFS_MAGIC if memfd => Ok(backing(MappingKind::Memfd, BASE_PAGE)),
            TMPFS_MAGIC => Ok(backing(MappingKind::Tmpfs, BASE_PAGE)),
            _ if nameless => Ok(backing(MappingKind::Tmpfs, BASE_PAGE)),
            _ => Ok(backing(MappingKind::File, BASE_PAGE)),
        }
    }

    /// Opens the file of a mapping anew: with an offset and flags of its own.
    ///
    /// # Errors
    /// No right to.
    pub fn open(&self, mapping: &Mapping, write: bool) -> Result<File, Error> {
        self.open_file(mapping, if write { OFlags::RDWR } else { OFlags::RDONLY })
    }

    /// The file of a mapping, to ask for its properties; needs no right to its contents.
    ///
    /// # Errors
    /// No right to look at the process's files.
    pub fn look_at(&self, mapping: &Mapping) -> Result<File, Error> {
        self.open_file(mapping, OFlags::PATH)
    }

    fn open_file(&self, mapping: &Mapping, flags: OFlags) -> Result<File, Error> {
        let (start, end) = mapping.whole;
        let name = match self.descriptor(mapping) {
            Some(descriptor) => format!("fd/{descriptor}"),
            None => format!("map_files/{start:x}-{end:x}"),
        };
        let file = self.process.open(&name, flags).map_err(|error| match error {
            Error::Permission { what, source, .. } => {
                Error::Permission { what, needs: "CAP_DAC_OVERRIDE and CAP_CHECKPOINT_RESTORE", source }
            }
            other => other,
        })?;
        // The process may have closed the descriptor and opened another file by that number.
        match fstat(file.as_fd()) {
            Ok(stat) if stat.st_ino == mapping.inode => Ok(file),
            _ => Err(Error::NotMapped { address: mapping.start }),
        }
    }

    fn descriptor(&self, mapping: &Mapping) -> Option<i32> {
        let same = |(device, inode, _): &&(u64, u64, i32)| (*device, *inode) == (mapping.device, mapping.inode);
        self.files.iter().filter(|_| mapping.inode != 0).find(same).map(|(_, _, descriptor)| *descriptor)
    }

    /// By `/proc/PID/smaps`, which walks all page tables: only where nothing else tells.
    fn shown_page_size(&self, mapping: &Mapping) -> Result<u64, Error> {
        let smaps = self.process.read("smaps")?;
        let (start, end) = mapping.whole;
        let of_mapping = smaps.split_once(&format!("{start:x}-{end:x} ")).map_or("", |(_, rest)| rest);
        let kibibytes =
            status_field(of_mapping, "KernelPageSize").and_then(|size| size.split(' ').next()?.parse::<u64>().ok());
        kibibytes.map(|size| size << 10).ok_or(Error::NotMapped { address: mapping.start })
    }
}
