//! The guest's report, out of a copy of its first memory: the same reading as of a guest that runs in our own VMM.

use std::io;
use std::path::Path;

use crate::guest::report::Report;
use crate::guest::{MAX_RECORDS, RECORDS_GPA};
use crate::machine::MappedRegion;
use crate::report_reader;

/// Bytes of guest memory, from GPA 0, that hold the report.
pub const DUMP_BYTES: u64 = RECORDS_GPA + MAX_RECORDS * 16;

/// Reads the report out of a file with the first [`DUMP_BYTES`] of guest memory.
///
/// # Errors
/// The file cannot be read, or is too short.
pub fn of_dump(path: &Path) -> io::Result<Report> {
    let bytes = std::fs::read(path)?;
    if (bytes.len() as u64) < DUMP_BYTES {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("{} of {DUMP_BYTES} bytes", bytes.len())));
    }
    let region = MappedRegion { gpa: 0, hva: bytes.as_ptr() as u64, size: DUMP_BYTES };
    report_reader::read_newest(&region)
}
