//! The settings of a pager that an operator may change.

use std::time::Duration;

use crate::sched::cpu_set::CpuSet;

/// The settings of one pager.
#[derive(Debug, Clone, Default)]
pub struct Tuning {
    /// How long the fault thread polls for the next fault before it sleeps; it polls longer for a reply.
    pub spin: Duration,
    /// CPUs of the fault thread on a destination, and of the urgent lane's thread on a source.
    pub page_path_cpus: CpuSet,
    /// CPUs of the threads of bulk lanes, on either side.
    pub lane_cpus: CpuSet,
    /// Allows the real-time class to the fault thread, and to a bulk lane that receives directly, during a heavy push.
    pub real_time: bool,
    /// Keeps the host's CPUs out of their idle states while a guest faults.
    pub keep_awake: bool,
    /// Lets preallocated memory consist of huge pages if they cost no more than small ones.
    pub huge_pages: bool,
    /// TCP congestion control of the lanes; empty: the host's.
    pub congestion_control: String,
}
