//! `/proc/PID` (proc_pid_stat(5), proc_pid_status(5)): when a process started, where a thread runs, its other numbers.

/// When a process was started, in clock ticks after boot: with its pid it names the process for good.
/// 0 when it is gone or cannot be read. Field 22 of `/proc/PID/stat`, proc(5).
pub fn process_started(pid: u32) -> u64 {
    stat_field(&format!("/proc/{pid}"), 22).unwrap_or(0)
}

/// A field of the `stat` of a process or a thread, by its number in proc_pid_stat(5), from the third on; `None` when that is
/// gone or cannot be read.
pub fn stat_field(directory: &str, number: usize) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("{directory}/stat")).ok()?;
    // Behind the name, which may hold anything, the third field is the first.
    stat.rsplit_once(')')?.1.split_whitespace().nth(number.checked_sub(3)?)?.parse().ok()
}

/// Whether a process has this number in its own pid namespace: the last of `NSpid`.
pub fn is_known_as(pid: u32, number: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    numbers.and_then(|numbers| numbers.split_whitespace().last()) == Some(number.to_string().as_str())
}

#[cfg(test)]
mod tests;
