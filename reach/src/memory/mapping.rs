//! The mappings behind ranges: `/proc/PID/maps`, proc_pid_maps(5).

use crate::error::Error;
use crate::identity::Process;
use crate::proto::HvaRange;

/// The smallest page.
pub const BASE_PAGE: u64 = 4096;

/// A piece of a mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// First byte.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// `PROT_READ`.
    pub readable: bool,
    /// `MAP_SHARED`.
    pub shared: bool,
    /// Of `start` in the file.
    pub offset: u64,
    /// As `st_dev`.
    pub device: u64,
    /// 0: no file.
    pub inode: u64,
    /// As the kernel shows it.
    pub path: String,
    /// The whole mapping's addresses: its name in `/proc/PID/map_files`.
    pub whole: (u64, u64),
}

impl Mapping {
    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.end - self.start
    }

    /// Cuts the mapping to a range.
    fn within(&self, start: u64, end: u64) -> Self {
        let (start, end) = (start.max(self.start), end.min(self.end));
        let offset = if self.inode == 0 { 0 } else { self.offset + (start - self.start) };
        Self { start, end, offset, ..self.clone() }
    }
}

/// All mappings of a process.
#[derive(Debug)]
pub struct Mappings(Vec<Mapping>);

impl Mappings {
    /// Reads them.
    ///
    /// # Errors
    /// The process has ended, or may not be looked at.
    pub fn read(process: &Process) -> Result<Self, Error> {
        Ok(Self::parse(&process.read("maps")?))
    }

    fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(parse).collect())
    }

    /// The pieces of a range, without a hole.
    ///
    /// # Errors
    /// [`Error::NotMapped`] at the first hole.
    pub fn pieces(&self, range: &HvaRange) -> Result<Vec<Mapping>, Error> {
        let end = end_of(range)?;
        let (mut at, mut pieces) = (range.start, Vec::new());
        for mapping in self.0.iter().filter(|mapping| mapping.end > range.start) {
            if at >= end || mapping.start > at {
                break;
            }
            pieces.push(mapping.within(at, end));
            at = mapping.end;
        }
        if at < end { Err(Error::NotMapped { address: at }) } else { Ok(pieces) }
    }
}

/// One past the last byte of a range of whole pages.
///
/// # Errors
/// The range is empty, not of whole pages, or wraps around.
pub fn end_of(range: &HvaRange) -> Result<u64, Error> {
    let end = range.start.checked_add(range.size).filter(|end| *end > range.start);
    end.filter(|end| (range.start | end).is_multiple_of(BASE_PAGE)).ok_or_else(|| Error::Invalid {
        field: "ranges",
        value: format!("{:#x} of {} bytes", range.start, range.size),
        remedy: "start and size must be multiples of 4096, and the size not 0",
    })
}

fn parse(line: &str) -> Option<Mapping> {
    let hexadecimal = |text| u64::from_str_radix(text, 16).ok();
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let (start, end) = (hexadecimal(start)?, hexadecimal(end)?);
    let permissions = fields.next()?;
    let (readable, shared) = (permissions.starts_with('r'), permissions.ends_with('s'));
    let offset = hexadecimal(fields.next()?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = rustix::fs::makedev(hexadecimal(major)?.try_into().ok()?, hexadecimal(minor)?.try_into().ok()?);
    let inode = fields.next()?.parse().ok()?;
    let path = fields.next().unwrap_or_default().trim_start().to_owned();
    Some(Mapping { start, end, readable, shared, offset, device, inode, path, whole: (start, end) })
}

#[cfg(test)]
mod tests;
