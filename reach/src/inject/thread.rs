//! Which thread runs a call: never an excluded one; the one that notices least first.

use super::restart::{Disturbance, disturbance};
use crate::error::Error;
use crate::identity::{Process, is_kernel_worker, status_field};

/// How suitable a thread is, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Suitability {
    /// Asleep in a call that the kernel restarts, or stopped as a whole.
    Asleep,
    /// Asleep in a call that is begun anew.
    BegunAnew,
    /// Runs its own code, or not known.
    Running,
    /// Asleep in a call that then waits longer.
    WaitsLonger,
    /// In the kernel, deaf to interruption: it may not stop.
    Uninterruptible,
}

/// The threads that may be stopped, the best first.
///
/// # Errors
/// One is traced already; the process has ended.
pub(super) fn candidates(process: &Process, excluded: &[i32]) -> Result<Vec<i32>, Error> {
    let mut candidates = Vec::new();
    for thread in process.numbers("task")? {
        // A thread may end at any time.
        let Ok(status) = process.read(&format!("task/{thread}/status")) else { continue };
        check_untraced(thread, &status)?;
        let suitability = (!excluded.contains(&thread)).then(|| suitability_of(process, thread, &status)).flatten();
        candidates.extend(suitability.map(|suitability| (suitability, thread)));
    }
    candidates.sort_unstable();
    Ok(candidates.into_iter().map(|(_, thread)| thread).collect())
}

/// Refuses a thread that a debugger has, by its status.
///
/// # Errors
/// It is traced.
pub(super) fn check_untraced(thread: i32, status: &str) -> Result<(), Error> {
    match status_field(status, "TracerPid").and_then(|tracer| tracer.parse().ok()) {
        None | Some(0) => Ok(()),
        Some(tracer) => Err(Error::Traced { thread, tracer }),
    }
}

/// Whether a thread runs no more, by its status.
pub(super) fn has_ended(status: &str) -> bool {
    status_field(status, "State").is_none_or(|state| state.starts_with(['Z', 'X']))
}

fn suitability_of(process: &Process, thread: i32, status: &str) -> Option<Suitability> {
    if process.read(&format!("task/{thread}/stat")).is_ok_and(|stat| is_kernel_worker(&stat)) {
        return None;
    }
    let state = status_field(status, "State")?.chars().next()?;
    // Not readable: the state alone must do.
    let call = process.read(&format!("task/{thread}/syscall")).unwrap_or_default();
    suitability(state, &call)
}

/// By the state of proc_pid_status(5) and the line of proc_pid_syscall(5); `None`: it has ended.
fn suitability(state: char, call: &str) -> Option<Suitability> {
    let mut fields = call.split_whitespace();
    let number = fields.next().and_then(|number| number.parse::<i64>().ok()).filter(|number| *number >= 0);
    let arguments: Vec<_> = fields.take(6).filter_map(hexadecimal).collect();
    match (state, number) {
        ('Z' | 'X', _) => None,
        ('D', _) => Some(Suitability::Uninterruptible),
        ('S' | 'T', Some(number)) => Some(match disturbance(number, &arguments) {
            Disturbance::None => Suitability::Asleep,
            Disturbance::BegunAnew => Suitability::BegunAnew,
            Disturbance::WaitsLonger => Suitability::WaitsLonger,
        }),
        _ => Some(Suitability::Running),
    }
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests;
