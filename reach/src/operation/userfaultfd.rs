//! A userfaultfd of the process's address space, and our copy of it.

use std::os::fd::{AsFd, OwnedFd};

use rustix::process::PidfdGetfdFlags;

use crate::error::Error;
use crate::identity::Process;
use crate::inject::{Call, Injector};
use crate::memory::presence::Presence;
use crate::proto::{CreateUserfaultfdReply, CreateUserfaultfdRequest, HvaRange};
use crate::sys::userfaultfd::{enable, register, unregister};

/// What `/proc/PID/fd` shows of a userfaultfd.
const USERFAULTFD: &str = "anon_inode:[userfaultfd]";
const DEVICE: &str = "/dev/userfaultfd";

/// Bits of UFFDIO_API by kernel name, linux/userfaultfd.h.
const FEATURES: [(&str, u64); 17] = [
    ("UFFD_FEATURE_PAGEFAULT_FLAG_WP", 1 << 0),
    ("UFFD_FEATURE_EVENT_FORK", 1 << 1),
    ("UFFD_FEATURE_EVENT_REMAP", 1 << 2),
    ("UFFD_FEATURE_EVENT_REMOVE", 1 << 3),
    ("UFFD_FEATURE_MISSING_HUGETLBFS", 1 << 4),
    ("UFFD_FEATURE_MISSING_SHMEM", 1 << 5),
    ("UFFD_FEATURE_EVENT_UNMAP", 1 << 6),
    ("UFFD_FEATURE_SIGBUS", 1 << 7),
    ("UFFD_FEATURE_THREAD_ID", 1 << 8),
    ("UFFD_FEATURE_MINOR_HUGETLBFS", 1 << 9),
    ("UFFD_FEATURE_MINOR_SHMEM", 1 << 10),
    ("UFFD_FEATURE_EXACT_ADDRESS", 1 << 11),
    ("UFFD_FEATURE_WP_HUGETLBFS_SHMEM", 1 << 12),
    ("UFFD_FEATURE_WP_UNPOPULATED", 1 << 13),
    ("UFFD_FEATURE_POISON", 1 << 14),
    ("UFFD_FEATURE_WP_ASYNC", 1 << 15),
    ("UFFD_FEATURE_MOVE", 1 << 16),
];

/// Makes one, registers the ranges and proves that they are empty: a page that came before the registration would never
/// fault. A failure closes it again.
pub(super) fn create(
    process: &Process,
    request: &CreateUserfaultfdRequest,
    injector: &mut Injector,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<CreateUserfaultfdReply, Error> {
    let features = bits(&request.features)?;
    let presence = Presence::of(process)?;
    presence.check_empty(&request.ranges)?;
    if let Some(device) = request.device {
        check_descriptor(process, device, DEVICE)?;
    }
    let number = injector.run(&Call::userfaultfd(request.device))? as u32;
    let made = adopt(process, number, features, &request.ranges).and_then(|(uffd, ioctls)| {
        let finished = presence.check_empty(&request.ranges).and_then(|()| match request.close_in_process {
            true => injector.run(&Call::close(number)).map(drop),
            false => Ok(()),
        });
        finished.inspect_err(|_| take_back(&uffd, &request.ranges)).map(|()| (uffd, ioctls))
    });
    match made {
        Ok((uffd, ioctls)) => {
            descriptors.push(uffd);
            let descriptor_in_process = (!request.close_in_process).then_some(number);
            Ok(CreateUserfaultfdReply { descriptor_in_process, ioctls })
        }
        Err(error) => {
            // The first error is the one to report.
            let _ = injector.run(&Call::close(number));
            Err(error)
        }
    }
}

/// Closes one in the process.
pub(super) fn close(process: &Process, descriptor: u32, injector: &mut Injector) -> Result<(), Error> {
    check_descriptor(process, descriptor, USERFAULTFD)?;
    injector.run(&Call::close(descriptor)).map(drop)
}

/// Copies the descriptor and registers the ranges through the copy.
fn adopt(process: &Process, number: u32, features: u64, ranges: &[HvaRange]) -> Result<(OwnedFd, Vec<u64>), Error> {
    let failed = |what: &str, error| process.failed(format!("{what} of descriptor {number}"), error);
    let uffd = rustix::process::pidfd_getfd(process.pidfd(), number.cast_signed(), PidfdGetfdFlags::empty())
        .map_err(|error| failed("pidfd_getfd", error.into()))?;
    check_descriptor(process, number, USERFAULTFD)?;
    enable(uffd.as_fd(), features).map_err(|error| match enable(uffd.as_fd(), 0) {
        Ok(known) if features & !known != 0 => Error::NoFeature { names: names(features & !known) },
        _ => failed("UFFDIO_API", error),
    })?;
    let mut ioctls = Vec::new();
    for range in ranges {
        let registered = register(uffd.as_fd(), range.start, range.size).inspect_err(|_| take_back(&uffd, ranges));
        ioctls.push(registered.map_err(|error| failed(&format!("UFFDIO_REGISTER at {:#x}", range.start), error))?);
    }
    Ok((uffd, ioctls))
}

/// Takes the ranges back, so that no thread waits for pages that nobody brings.
fn take_back(uffd: &OwnedFd, ranges: &[HvaRange]) {
    for range in ranges {
        // A range that was not registered yet.
        let _ = unregister(uffd.as_fd(), range.start, range.size);
    }
}

fn check_descriptor(process: &Process, descriptor: u32, expected: &'static str) -> Result<(), Error> {
    let actual = process.link(&format!("fd/{descriptor}"))?;
    if actual == expected { Ok(()) } else { Err(Error::Descriptor { descriptor, actual, expected }) }
}

fn bits(wanted: &[String]) -> Result<u64, Error> {
    wanted.iter().try_fold(0, |bits, name| {
        let known = FEATURES.iter().find(|(known, _)| known == name).map(|(_, bit)| bits | bit);
        known.ok_or_else(|| Error::Invalid {
            field: "create_userfaultfd.features",
            value: format!("{name:?}"),
            remedy: "use a name of linux/userfaultfd.h",
        })
    })
}

fn names(bits: u64) -> String {
    FEATURES.iter().filter(|(_, bit)| bits & bit != 0).map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
