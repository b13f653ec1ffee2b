//! The scheduling of the pager's threads: class, CPU, spinning, idle states.
//!
//! | thread | class | CPU | sleeps |
//! |---|---|---|---|
//! | fault thread (destination) | favoured; real-time during a heavy push | `page_path_cpus` | in poll(2), after it has spun |
//! | urgent lane (source) | favoured | that of its packets during a light push, else `page_path_cpus` | in read(2) |
//! | bulk lane (destination) | real-time, favoured or batch ([`crate::destination`]) | `lane_cpus`, without the faulting vCPU's | in poll(2), and in pauses |
//! | bulk lane (source), map-ahead | batch | `lane_cpus` | while the rate limit holds it back |
//! | CPU latency | fair | any | until the guest faults |
//! | main: control service, VMM's socket | fair | any | in epoll(7) |
//!
//! ```text
//!  fault ──▶ fault thread ──▶ urgent lane (source) ──▶ fault thread ──▶ vCPU
//! ```
//!
//! Five threads take part in one fault, so each hand-over counts:
//!
//! - A thread that sleeps needs time to wake. The fault thread spins first ([`adaptive_spin`]), and the host's CPUs stay out of
//!   their idle states while the guest faults ([`cpu_latency`]).
//! - A thread that is awake may keep a CPU from the next one. Threads of the pager yield after each step ([`priority`]).
//! - A heavy push leaves no CPU idle ([`push_load`]). Then the fault thread is real-time and does not spin ([`fault_thread`]).
//! - A real-time bulk lane pauses so that other threads can run ([`rt_throttle`]), and leaves the CPU of the faulting vCPU
//!   ([`vcpu_avoidance`]).
//! - The source's urgent lane follows the CPU that receives its packets ([`incoming_cpu`]).
//!
//! The classes need `CAP_SYS_NICE`. Without it the pager is slower under load, and as correct.

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
