//! The contents of small ranges, and which page stands in the way.

use rustix::fs::{OFlags, fstat};

use super::backing::OpenFiles;
use super::mapping::{BASE_PAGE, Mappings, end_of};
use crate::error::Error;
use crate::identity::Process;
use crate::proto::{HvaRange, MappingKind};
use crate::sys::memory;
use crate::sys::pagemap::{self, Entry};

/// Most bytes of one request.
const LIMIT: u64 = 256 << 20;

/// Reads ranges.
///
/// # Errors
/// [`Error::Poisoned`], [`Error::NotMapped`] or [`Error::Unreadable`] with the page.
pub fn read(process: &Process, ranges: &[HvaRange]) -> Result<Vec<Vec<u8>>, Error> {
    let total = ranges.iter().fold(0u64, |total, range| total.saturating_add(range.size));
    if total > LIMIT {
        return Err(Error::Invalid {
            field: "read_memory.ranges",
            value: format!("{total} bytes in all"),
            remedy: "read at most 256 MiB in a request",
        });
    }
    ranges.iter().map(|range| read_range(process, range)).collect()
}

fn read_range(process: &Process, range: &HvaRange) -> Result<Vec<u8>, Error> {
    end_of(range)?;
    let mut contents = vec![0; range.size as usize];
    let mut done = 0;
    while done < contents.len() {
        let at = range.start + done as u64;
        match memory::read(process.pid(), at, &mut contents[done..]) {
            Ok(read @ 1..) => done += read,
            Ok(_) => return Err(unreadable(process, at, std::io::ErrorKind::UnexpectedEof.into())),
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => return Err(unreadable(process, at, error)),
            Err(error) => return Err(process.failed(format!("read memory of process {}", process.pid()), error)),
        }
    }
    // If the kernel gave the pid to another process, this one has ended.
    if process.has_ended() { Err(Error::Gone { pid: process.pid() }) } else { Ok(contents) }
}

/// The error for the first byte that could not be read.
fn unreadable(process: &Process, address: u64, source: std::io::Error) -> Error {
    let address = address / BASE_PAGE * BASE_PAGE;
    match is_poisoned(process, address) {
        Ok(true) => Error::Poisoned { address },
        Ok(false) => Error::Unreadable { address, source },
        Err(error) => error,
    }
}

/// Whether poison explains that a page cannot be read. The kernel shows markers to CAP_SYS_ADMIN alone, so the other
/// explanations are ruled out: no right to read, a guard page, the end of the file.
fn is_poisoned(process: &Process, address: u64) -> Result<bool, Error> {
    let pieces = Mappings::read(process)?.pieces(&HvaRange { start: address, size: BASE_PAGE })?;
    let Some(piece) = pieces.first().filter(|piece| piece.readable) else { return Ok(false) };
    let pagemap = process.open("pagemap", OFlags::RDONLY)?;
    match pagemap::entry(&pagemap, address).map_err(|error| process.failed("read the page tables".into(), error))? {
        Entry::Guard => Ok(false),
        Entry::Other => Ok(true),
        Entry::Empty => {
            // A page that is bad in the file is not mapped.
            let files = OpenFiles::read(process)?;
            let of_memory = !matches!(files.backing(piece)?.kind, MappingKind::Anonymous | MappingKind::File);
            let size = files.look_at(piece).and_then(|file| {
                fstat(&file).map_err(|error| process.failed(format!("look at {}", piece.path), error.into()))
            });
            Ok(of_memory && piece.offset < size?.st_size.cast_unsigned())
        }
    }
}
