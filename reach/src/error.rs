//! Reasons for refusing a request, each with its remedy.

use std::io;

use thiserror::Error;

use crate::proto::{ReachError, ReachErrorCode};

/// Field or object, actual value, remedy.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum Error {
    #[error("{field} is {value}; {remedy}")]
    Invalid { field: &'static str, value: String, remedy: &'static str },
    #[error("process {pid} has ended; start the VMM again and repeat the request for the new process")]
    Gone { pid: i32 },
    #[error(
        "process.start_time is {given}, but process {pid} was started at {actual}; look the VMM's process up again"
    )]
    StartTime { pid: i32, given: u64, actual: u64 },
    #[error("process.pidfd is of process {actual}, not of {pid}; open it for the pid of the request")]
    Pidfd { pid: i32, actual: i32 },
    #[error("process {pid} is a kernel thread; name the VMM's process")]
    KernelThread { pid: i32 },
    #[error("thread {thread} does not run 64-bit code (cs {cs:#x}); only x86-64 VMMs can be adopted")]
    NotX8664 { thread: i32, cs: u64 },
    #[error("task {tracer} traces thread {thread}; end that debugger, or wait for the other request")]
    Traced { thread: i32, tracer: i32 },
    #[error("process {pid} runs as user {uid}, vmferry-reach as {own}; run vmferryd as root or as that user")]
    OtherUser { pid: i32, uid: u32, own: u32 },
    #[error("{what} is not permitted ({source}); it needs {needs}")]
    Permission { what: String, needs: &'static str, source: io::Error },
    #[error("the seccomp filter of thread {thread} answers {call} with {action}; set injection.seccomp to SUSPEND")]
    SeccompForbids { thread: i32, call: &'static str, action: &'static str },
    #[error(
        "thread {thread} is under seccomp, and whether it allows {call} cannot be read ({source}); grant CAP_SYS_ADMIN, or \
         set injection.seccomp to TRUST if the filter is known to allow it"
    )]
    SeccompUnreadable { thread: i32, call: &'static str, source: io::Error },
    #[error("process {pid} has no thread left that may be stopped, {excluded} are excluded; exclude only vCPUs")]
    NoThread { pid: i32, excluded: usize },
    #[error("thread {thread} has ended; repeat the request")]
    ThreadEnded { thread: i32 },
    #[error("thread {thread} did not stop in time, it sleeps in the kernel; repeat the request")]
    NotStopped { thread: i32 },
    #[error("no syscall instruction is known in thread {thread}: it is not in a system call, and has no vDSO")]
    NoInstruction { thread: i32 },
    #[error("signal {signal} instead of {call} in thread {thread}: its code is not what it seems")]
    Faulted { thread: i32, call: &'static str, signal: i32 },
    #[error("{call} in thread {thread} failed: {source}{remedy}")]
    Call { thread: i32, call: &'static str, source: io::Error, remedy: &'static str },
    #[error("the page at {address:#x} is there; set discard, or start the VMM without preallocated memory")]
    NotEmpty { address: u64 },
    #[error("nothing is mapped at {address:#x}; look the layout up again")]
    NotMapped { address: u64 },
    #[error("the page at {address:#x} is poisoned; leave it out")]
    Poisoned { address: u64 },
    #[error("the page at {address:#x} cannot be read: {source}")]
    Unreadable { address: u64, source: io::Error },
    #[error(
        "the memory at {address:#x} is of {path:?}, {why}; use memory-backend-memfd, or a file of a tmpfs or hugetlbfs"
    )]
    Backing { address: u64, path: String, why: &'static str },
    #[error("this kernel lacks {names}; UFFDIO_POISON came with Linux 6.6")]
    NoFeature { names: String },
    #[error("descriptor {descriptor} of the process is {actual:?}, not {expected}")]
    Descriptor { descriptor: u32, actual: String, expected: &'static str },
    #[error("{what}: {source}")]
    System { what: String, source: io::Error },
}

impl Error {
    /// The code by which a caller decides.
    #[must_use]
    pub fn code(&self) -> ReachErrorCode {
        match self {
            Self::Invalid { .. } => ReachErrorCode::Invalid,
            Self::Gone { .. } => ReachErrorCode::Gone,
            Self::StartTime { .. } | Self::Pidfd { .. } | Self::KernelThread { .. } | Self::NotX8664 { .. } => {
                ReachErrorCode::Identity
            }
            Self::Traced { .. } => ReachErrorCode::Traced,
            Self::OtherUser { .. } | Self::Permission { .. } => ReachErrorCode::Permission,
            Self::SeccompForbids { .. } | Self::SeccompUnreadable { .. } => ReachErrorCode::Seccomp,
            Self::NoThread { .. } | Self::ThreadEnded { .. } | Self::NotStopped { .. } => ReachErrorCode::NoThread,
            Self::Call { .. } => ReachErrorCode::Call,
            Self::NotEmpty { .. } => ReachErrorCode::NotEmpty,
            Self::NotMapped { .. } => ReachErrorCode::NotMapped,
            Self::Poisoned { .. } => ReachErrorCode::Poisoned,
            Self::Backing { .. } => ReachErrorCode::Backing,
            Self::NoFeature { .. } => ReachErrorCode::Unsupported,
            Self::Faulted { .. }
            | Self::NoInstruction { .. }
            | Self::Unreadable { .. }
            | Self::Descriptor { .. }
            | Self::System { .. } => ReachErrorCode::Failed,
        }
    }

    fn address(&self) -> Option<u64> {
        match self {
            Self::NotEmpty { address }
            | Self::NotMapped { address }
            | Self::Poisoned { address }
            | Self::Unreadable { address, .. }
            | Self::Backing { address, .. } => Some(*address),
            _ => None,
        }
    }

    fn kernel_said(&self) -> Option<&io::Error> {
        match self {
            Self::Permission { source, .. }
            | Self::SeccompUnreadable { source, .. }
            | Self::Call { source, .. }
            | Self::Unreadable { source, .. }
            | Self::System { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl From<&Error> for ReachError {
    fn from(error: &Error) -> Self {
        Self {
            code: error.code().into(),
            message: error.to_string(),
            address: error.address(),
            errno: error.kernel_said().and_then(io::Error::raw_os_error).and_then(|errno| errno.try_into().ok()),
        }
    }
}
