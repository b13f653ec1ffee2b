//! CPU affinity of threads (sched_setaffinity(2)).

use std::str::FromStr;

/// CPUs by number, e.g. `2-3,7`; none: anywhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuSet(Vec<usize>);

impl CpuSet {
    /// Each CPU that the calling thread may run on, alone.
    pub fn each_allowed() -> Vec<Self> {
        Self::allowed().0.into_iter().map(|cpu| Self(vec![cpu])).collect()
    }

    /// All CPUs that the calling thread may run on (sched_getaffinity(2)); none where that cannot be told.
    pub fn allowed() -> Self {
        // SAFETY: a zeroed set is an empty one.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills a set of the size that is said; 0 is the calling thread.
        if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) } != 0 {
            return Self::default();
        }
        // SAFETY: numbers below CPU_SETSIZE.
        Self((0..libc::CPU_SETSIZE as usize).filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) }).collect())
    }

    /// Without one; none where that leaves none.
    pub fn without(&self, cpu: usize) -> Self {
        Self(self.0.iter().copied().filter(|other| *other != cpu).collect())
    }

    /// Nothing but one; none where that is not among them.
    pub fn only(&self, cpu: usize) -> Self {
        Self(self.0.iter().copied().filter(|other| *other == cpu).collect())
    }

    /// The calling thread runs there from now on; where it may not it stays where it is.
    pub fn pin(&self) {
        if self.0.is_empty() {
            return;
        }
        // SAFETY: a zeroed set is an empty one.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        for cpu in &self.0 {
            // SAFETY: parsing has checked that the number is below CPU_SETSIZE.
            unsafe { libc::CPU_SET(*cpu, &mut set) };
        }
        // SAFETY: a set of the size that is said; 0 is the calling thread.
        if unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) } != 0 {
            tracing::warn!(cpus = ?self.0, error = %std::io::Error::last_os_error(), "thread.not_placed");
        }
    }
}

/// Why a list of CPUs cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuSetError {
    /// A part is not the number of a CPU.
    #[error("{0:?} is no CPU of 0 to {last}", last = libc::CPU_SETSIZE - 1)]
    NoCpu(String),
    /// A range is in descending order.
    #[error("{0:?} ends before it begins")]
    Backwards(String),
}

impl FromStr for CpuSet {
    type Err = CpuSetError;

    fn from_str(text: &str) -> Result<Self, CpuSetError> {
        let number = |part: &str| match part.trim().parse::<usize>() {
            Ok(cpu) if cpu < libc::CPU_SETSIZE as usize => Ok(cpu),
            _ => Err(CpuSetError::NoCpu(part.to_owned())),
        };
        let mut cpus = Vec::new();
        for part in text.split(',').filter(|_| !text.trim().is_empty()) {
            match part.split_once('-') {
                None => cpus.push(number(part)?),
                Some((first, last)) if number(first)? <= number(last)? => cpus.extend(number(first)?..=number(last)?),
                Some(_) => return Err(CpuSetError::Backwards(part.to_owned())),
            }
        }
        Ok(Self(cpus))
    }
}

#[cfg(test)]
mod tests;
