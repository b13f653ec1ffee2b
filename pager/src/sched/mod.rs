//! How threads get their CPU: affinity, priority, spinning, idle states.

pub mod adaptive_spin;
pub mod cpu_latency;
pub mod cpu_set;
pub mod cpu_time;
pub mod fault_thread;
pub mod incoming_cpu;
pub mod priority;
pub mod push_load;
pub mod rt_throttle;
pub mod vcpu_avoidance;
