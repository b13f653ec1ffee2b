//! Reads the guest's report by system calls, and dereferences no guest memory. A page that has not arrived blocks the reader.
//! A poisoned page, or memory that is gone, is an error, and does not end the process.

use std::io;

use crate::guest::config::ConfigPage;
use crate::guest::report::{MachineCheckRecord, Report, ReportHeader, VcpuBlock, newest};
use crate::guest::{CONFIG_GPA, MAX_RECORDS, MAX_VCPUS, PAGE_SIZE, RECORDS_GPA, VCPU_BLOCKS_GPA};
use crate::machine::{MappedRegion, REPORT_GPA};

/// Plain structures of integers, for which every bit pattern is a value.
pub(crate) trait Plain: Copy {}
impl Plain for u64 {}
impl Plain for ConfigPage {}
impl Plain for ReportHeader {}
impl Plain for VcpuBlock {}
impl Plain for MachineCheckRecord {}

/// Reads the report of a guest in that epoch, none before its state is here; may block as long as a page fault does.
///
/// # Errors
/// EFAULT: a page of the report is poisoned, or the memory is gone.
pub fn read(region0: &MappedRegion, epoch: Option<u64>) -> io::Result<Report> {
    summed(region0, |_| epoch)
}

/// The same in the newest epoch of any vCPU: before one has made a turn on this host, that of the host before.
///
/// # Errors
/// As [`read`].
pub fn read_newest(region0: &MappedRegion) -> io::Result<Report> {
    summed(region0, newest)
}

fn summed(region0: &MappedRegion, epoch: impl FnOnce(&[VcpuBlock]) -> Option<u64>) -> io::Result<Report> {
    let config: ConfigPage = one(region0, CONFIG_GPA)?;
    let header: ReportHeader = one(region0, REPORT_GPA)?;
    let vcpus = config.vcpus.min(u64::from(MAX_VCPUS));
    let blocks =
        (0..vcpus).map(|i| one(region0, VCPU_BLOCKS_GPA + i * PAGE_SIZE)).collect::<io::Result<Vec<VcpuBlock>>>()?;
    let size = size_of::<MachineCheckRecord>() as u64;
    let records = (0..header.machine_checks.min(MAX_RECORDS))
        .map(|i| one(region0, RECORDS_GPA + i * size))
        .collect::<io::Result<Vec<MachineCheckRecord>>>()?;
    Ok(Report::new(&header, &blocks, &records, config.tsc_khz, epoch(&blocks)))
}

fn one<T: Plain>(region0: &MappedRegion, gpa: u64) -> io::Result<T> {
    value_at(region0.hva + gpa)
}

/// A value in this process's memory, whether it is mapped or not; may block as long as a page fault does.
///
/// # Errors
/// EFAULT: the page is poisoned, or nothing is mapped there.
pub(crate) fn value_at<T: Plain>(hva: u64) -> io::Result<T> {
    let mut value = std::mem::MaybeUninit::<T>::uninit();
    let len = size_of::<T>();
    let local = libc::iovec { iov_base: value.as_mut_ptr().cast(), iov_len: len };
    let remote = libc::iovec { iov_base: hva as *mut libc::c_void, iov_len: len };
    // SAFETY: the local vector is `value`; the remote one is only an address, which the kernel checks.
    let read = unsafe { libc::process_vm_readv(std::process::id() as libc::pid_t, &local, 1, &remote, 1, 0) };
    match usize::try_from(read) {
        // SAFETY: all bytes were written, and every bit pattern is a `T` (`Plain`).
        Ok(count) if count == len => Ok(unsafe { value.assume_init() }),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}
