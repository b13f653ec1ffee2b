//! CPU affinity of threads (sched_setaffinity(2)).

use std::str::FromStr;

use rustix::thread::{CpuSet as KernelSet, sched_getaffinity, sched_setaffinity};

/// CPUs by number, e.g. `2-3,7`; none: anywhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuSet(Vec<usize>);

impl CpuSet {
    /// Each CPU that the calling thread may run on, alone.
    pub fn each_allowed() -> Vec<Self> {
        Self::allowed().0.into_iter().map(|cpu| Self(vec![cpu])).collect()
    }

    /// All CPUs that the calling thread may run on (sched_getaffinity(2)); none if the call fails.
    pub fn allowed() -> Self {
        let Ok(set) = sched_getaffinity(None) else { return Self::default() };
        Self((0..KernelSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect())
    }

    /// The set without one CPU.
    pub fn without(&self, cpu: usize) -> Self {
        Self(self.0.iter().copied().filter(|other| *other != cpu).collect())
    }

    /// One CPU alone; none if it is not in the set.
    pub fn only(&self, cpu: usize) -> Self {
        Self(self.0.iter().copied().filter(|other| *other == cpu).collect())
    }

    /// Pins the calling thread to the set. A thread that may not run there keeps its CPUs.
    pub fn pin(&self) {
        if self.0.is_empty() {
            return;
        }
        let mut set = KernelSet::new();
        self.0.iter().for_each(|cpu| set.set(*cpu));
        if let Err(error) = sched_setaffinity(None, &set) {
            tracing::warn!(cpus = ?self.0, %error, "thread.not_placed");
        }
    }
}

/// The fault in a list of CPUs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuSetError {
    /// A part is not the number of a CPU.
    #[error("{0:?} is no CPU of 0 to {last}", last = KernelSet::MAX_CPU - 1)]
    NoCpu(String),
    /// A range is in descending order.
    #[error("{0:?} ends before it begins")]
    Backwards(String),
}

impl FromStr for CpuSet {
    type Err = CpuSetError;

    fn from_str(text: &str) -> Result<Self, CpuSetError> {
        let number = |part: &str| match part.trim().parse::<usize>() {
            Ok(cpu) if cpu < KernelSet::MAX_CPU => Ok(cpu),
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
