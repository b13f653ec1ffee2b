//! What an operator may set of how a pager's threads run.

use std::str::FromStr;
use std::time::Duration;

use crate::priority;

/// Spinning and placement of threads.
#[derive(Debug, Clone, Default)]
pub struct Tuning {
    /// How long a thread of a fault looks for more before it sleeps.
    pub spin: Duration,
    /// Of the thread that resolves faults on a destination.
    pub page_path_cpus: CpuList,
    /// Of the threads of a source's lanes.
    pub lane_cpus: CpuList,
}

impl Tuning {
    /// The calling thread resolves faults.
    pub fn enter_page_path(&self) {
        priority::urgent();
        self.page_path_cpus.pin();
    }
}

/// CPUs by number, e.g. `2-3,7`; none: anywhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuList(Vec<usize>);

impl CpuList {
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

impl FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| match part.trim().parse::<usize>() {
            Ok(cpu) if cpu < libc::CPU_SETSIZE as usize => Ok(cpu),
            _ => Err(format!("{part:?} is no CPU of 0 to {}", libc::CPU_SETSIZE - 1)),
        };
        let mut cpus = Vec::new();
        for part in text.split(',').filter(|_| !text.trim().is_empty()) {
            match part.split_once('-') {
                None => cpus.push(number(part)?),
                Some((first, last)) if number(first)? <= number(last)? => cpus.extend(number(first)?..=number(last)?),
                Some(_) => return Err(format!("{part:?} ends before it begins")),
            }
        }
        Ok(Self(cpus))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_read_or_refused_in_words() {
        let list = |text: &str| text.parse::<CpuList>().map(|list| list.0);
        assert_eq!(list(""), Ok(vec![]));
        assert_eq!(list("2-4, 7"), Ok(vec![2, 3, 4, 7]));
        for (text, word) in
            [("x", "no CPU"), ("3-1", "ends before"), ("1-", "no CPU"), ("99999", "no CPU"), ("1,,2", "no CPU")]
        {
            assert!(list(text).unwrap_err().contains(word), "{text}");
        }
    }

    #[test]
    fn a_placed_thread_runs_there_and_only_it() {
        let on = |cpus: &str| {
            let list: CpuList = cpus.parse().unwrap();
            std::thread::spawn(move || {
                list.pin();
                // SAFETY: a zeroed set is an empty one; the kernel fills it.
                let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
                // SAFETY: a set of the size that is said.
                unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) };
                // SAFETY: only reads the set.
                unsafe { libc::CPU_COUNT(&set) }
            })
            .join()
            .unwrap()
        };
        assert_eq!(on("0"), 1);
        assert_eq!(on(""), std::thread::available_parallelism().unwrap().get() as i32);
    }
}
