//! What ranges are made of, and which threads are the process's.

use std::os::fd::OwnedFd;

use crate::error::Error;
use crate::identity::{Process, status_field};
use crate::memory::backing::OpenFiles;
use crate::memory::mapping::{self, Mappings};
use crate::proto::{DescribeReply, DescribeRequest, Mapping, MappingKind, OpenBacking, ThreadIdentity};

/// Most files that one message passes (`SCM_MAX_FD`).
const MAX_FILES: usize = 253;

pub(super) fn describe(
    process: &Process,
    request: &DescribeRequest,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<DescribeReply, Error> {
    let mut files = Files { open: OpenFiles::read(process)?, wanted: request.open_backing(), opened: Vec::new() };
    let all = Mappings::read(process)?;
    let mut mappings = Vec::new();
    for range in &request.ranges {
        for piece in all.pieces(range)? {
            mappings.push(files.describe(&piece, descriptors)?);
        }
    }
    let status = process.read("status")?;
    let namespaced_pids = numbers(status_field(&status, "NSpid").unwrap_or_default());
    Ok(DescribeReply { mappings, threads: threads(process, &request.threads)?, namespaced_pids })
}

/// The files behind mappings; each is handed over once.
struct Files<'a> {
    open: OpenFiles<'a>,
    wanted: OpenBacking,
    /// Device and inode, in the order of the descriptors.
    opened: Vec<(u64, u64)>,
}

impl Files<'_> {
    fn describe(&mut self, piece: &mapping::Mapping, descriptors: &mut Vec<OwnedFd>) -> Result<Mapping, Error> {
        let backing = self.open.backing(piece)?;
        let has_file = backing.kind != MappingKind::Anonymous;
        let descriptor = if has_file { self.hand_over(piece, descriptors)? } else { None };
        Ok(Mapping {
            start: piece.start,
            size: piece.size(),
            kind: backing.kind.into(),
            shared: piece.shared,
            page_size: backing.page_size,
            path: piece.path.clone(),
            inode: has_file.then_some(piece.inode),
            device: piece.device,
            offset: piece.offset,
            descriptor,
            descriptor_in_process: backing.descriptor.map(i32::cast_unsigned),
        })
    }

    fn hand_over(&mut self, piece: &mapping::Mapping, descriptors: &mut Vec<OwnedFd>) -> Result<Option<u32>, Error> {
        if self.wanted == OpenBacking::Unspecified {
            return Ok(None);
        }
        let file = (piece.device, piece.inode);
        let index = match self.opened.iter().position(|opened| *opened == file) {
            Some(index) => index,
            None if self.opened.len() == MAX_FILES => {
                return Err(Error::Invalid {
                    field: "describe.ranges",
                    value: format!("of more than {MAX_FILES} files"),
                    remedy: "describe fewer in a request",
                });
            }
            None => {
                descriptors.push(self.open.open(piece, self.wanted == OpenBacking::ReadWrite)?.into());
                self.opened.push(file);
                self.opened.len() - 1
            }
        };
        Ok(u32::try_from(index).ok())
    }
}

/// Finds threads by the ids of the process's own namespace.
fn threads(process: &Process, wanted: &[u32]) -> Result<Vec<ThreadIdentity>, Error> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let mut known = Vec::new();
    for host_thread in process.numbers("task")? {
        // A thread may end at any time.
        let Ok(status) = process.read(&format!("task/{host_thread}/status")) else { continue };
        let innermost = numbers(status_field(&status, "NSpid").unwrap_or_default()).pop();
        known.extend(innermost.map(|thread| (thread, host_thread.cast_unsigned())));
    }
    let host_thread = |thread| known.iter().find(|(known, _)| *known == thread).map_or(0, |(_, host)| *host);
    Ok(wanted.iter().map(|thread| ThreadIdentity { thread: *thread, host_thread: host_thread(*thread) }).collect())
}

fn numbers(text: &str) -> Vec<u32> {
    text.split_whitespace().filter_map(|number| number.parse().ok()).collect()
}
