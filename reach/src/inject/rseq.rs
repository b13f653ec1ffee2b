//! Restartable sequences (rseq(2)): a thread that is moved out of one must come back at its abort handler.
//!
//! The kernel aborts a sequence that it interrupts, by the thread's instruction pointer. While a call is injected, that
//! points elsewhere: the kernel then forgets the sequence, and the thread would continue in the middle of it.

use crate::sys::memory;
use crate::sys::ptrace;

/// Offset of `rseq_cs` in `struct rseq`, linux/rseq.h.
const CRITICAL_SECTION: u64 = 8;

/// `struct rseq_cs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sequence {
    start: u64,
    size: u64,
    abort: u64,
}

impl Sequence {
    /// The address at which a thread continues that was at `ip`.
    fn resumes_at(&self, ip: u64) -> u64 {
        if ip.wrapping_sub(self.start) < self.size { self.abort } else { ip }
    }
}

/// The address at which a stopped thread continues that ran its own code at `ip`.
pub(super) fn resumes_at(thread: i32, ip: u64) -> u64 {
    sequence(thread).map_or(ip, |sequence| sequence.resumes_at(ip))
}

/// The sequence that the thread has announced; `None`: none.
fn sequence(thread: i32) -> Option<Sequence> {
    let area = ptrace::rseq_area(thread).ok().filter(|area| *area != 0)?;
    let [pointer] = words(thread, area + CRITICAL_SECTION)?;
    let [_version, start, size, abort] = words(thread, Some(pointer).filter(|pointer| *pointer != 0)?)?;
    Some(Sequence { start, size, abort })
}

fn words<const N: usize>(thread: i32, address: u64) -> Option<[u64; N]> {
    let mut bytes = vec![0; N * 8];
    let read = memory::read(thread, address, &mut bytes).ok()?;
    let mut words = bytes.get(..read)?.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_ne_bytes));
    let all: [Option<u64>; N] = std::array::from_fn(|_| words.next());
    all.into_iter().collect::<Option<Vec<_>>>()?.try_into().ok()
}

#[cfg(test)]
mod tests;
