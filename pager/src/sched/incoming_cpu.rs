//! Keeps the thread of an urgent lane on the CPU on which its connection's packets are received: that one is awake when an ask
//! comes, and any other would have to be woken, or leave what it does.

use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::sched::cpu_set::CpuSet;
use crate::sched::cpu_time::{host_idle, process_time, thread_time, thread_waited};
use crate::sched::push_load::PushLoad;

/// One ask of so many is looked at: what comes behind an answer may hold up who waits for it.
const SAMPLE_EVERY: u32 = 4;
/// It moves once so many of those in a row have come by way of another CPU.
const MOVE_AFTER: u32 = 8;
/// How often it is looked whether it is worth it.
const CROWDING_POLL: Duration = Duration::from_millis(200);
/// It is not, where the thread waited for a CPU for so many percent of the time.
const MAX_WAIT_PERCENT: u128 = 20;
/// Nor where all CPUs of the host together were idle for less than so many percent of one: then each has enough to do.
const MIN_IDLE_PERCENT: u128 = 10;
/// For so long it is not tried again then.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// Where the calling thread runs: beside a light push where its packets come, unless others want that CPU; else anywhere.
#[derive(Debug)]
pub struct FollowIncomingCpu {
    allowed: CpuSet,
    at: Option<usize>,
    /// Asks since one was looked at.
    passed: u32,
    /// By which CPU the last of those came, and how many of them.
    latest: (usize, u32),
    /// Work of the other threads of this process.
    push: PushLoad,
    checked: Instant,
    waited: Duration,
    idle: Duration,
    /// From then on; none: the push is heavy.
    follow_from: Option<Instant>,
}

impl FollowIncomingCpu {
    /// Of the calling thread.
    pub fn new(now: Instant) -> Self {
        Self::begin(now, thread_waited(), others_worked(), host_idle())
    }

    fn begin(now: Instant, waited: Duration, worked: Duration, idle: Duration) -> Self {
        let push = PushLoad::new(now, worked);
        Self {
            allowed: CpuSet::allowed(),
            at: None,
            passed: 0,
            latest: (0, 0),
            push,
            checked: now,
            waited,
            idle,
            follow_from: None,
        }
    }

    /// An ask that came on this lane is answered.
    pub fn step(&mut self, lane: &TcpStream) {
        self.passed += 1;
        if self.passed < SAMPLE_EVERY {
            return;
        }
        self.passed = 0;
        let now = Instant::now();
        if now.saturating_duration_since(self.checked) >= CROWDING_POLL {
            self.check_crowding(now, thread_waited(), others_worked(), host_idle());
        }
        if self.follow_from.is_some_and(|from| now >= from)
            && let Some(cpu) = incoming_cpu(lane)
        {
            self.came_by(cpu);
        }
    }

    fn came_by(&mut self, cpu: usize) {
        self.latest = (cpu, if self.latest.0 == cpu { self.latest.1 + 1 } else { 1 });
        if self.latest.1 != MOVE_AFTER || self.at == Some(cpu) {
            return;
        }
        let only = self.allowed.only(cpu);
        if only != CpuSet::default() {
            only.pin();
            self.at = Some(cpu);
        }
    }

    fn check_crowding(&mut self, now: Instant, waited: Duration, worked: Duration, idle: Duration) {
        let time = now.saturating_duration_since(self.checked).as_nanos();
        let crowded = waited.saturating_sub(self.waited).as_nanos() * 100 >= time * MAX_WAIT_PERCENT
            || idle.saturating_sub(self.idle).as_nanos() * 100 < time * MIN_IDLE_PERCENT;
        (self.checked, self.waited, self.idle) = (now, waited, idle);
        self.follow_from = match self.push.is_heavy(now, worked) {
            true => None,
            false if crowded => Some(now + RETRY_DELAY),
            false => self.follow_from.or(Some(now)),
        };
        if self.follow_from.is_none_or(|from| now < from) && self.at.take().is_some() {
            self.allowed.pin();
            self.latest.1 = 0;
        }
    }
}

fn others_worked() -> Duration {
    process_time().saturating_sub(thread_time())
}

/// The CPU on which the kernel received what came last on a connection (socket(7), `SO_INCOMING_CPU`).
fn incoming_cpu(lane: &TcpStream) -> Option<usize> {
    let (mut cpu, mut size) = (-1, size_of::<libc::c_int>() as libc::socklen_t);
    let (level, what, value) = (libc::SOL_SOCKET, libc::SO_INCOMING_CPU, (&raw mut cpu).cast());
    // SAFETY: room for an int, of the size that is said.
    let told = unsafe { libc::getsockopt(lane.as_raw_fd(), level, what, value, &raw mut size) } == 0;
    usize::try_from(cpu).ok().filter(|_| told)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    /// Of a thread of its own, which may run on these two CPUs at least.
    struct Course {
        follow: FollowIncomingCpu,
        worked: Duration,
        first: usize,
        second: usize,
    }

    impl Course {
        fn with_two_cpus(check: impl FnOnce(Self) + Send + 'static) {
            let allowed = CpuSet::allowed();
            let mut numbers = (0..libc::CPU_SETSIZE as usize).filter(|cpu| allowed.only(*cpu) != CpuSet::default());
            let (Some(first), Some(second)) = (numbers.next(), numbers.next()) else {
                return eprintln!("skipped: only one CPU");
            };
            let course = move || {
                let follow = FollowIncomingCpu::begin(Instant::now(), Duration::ZERO, Duration::ZERO, Duration::ZERO);
                check(Self { follow, worked: Duration::ZERO, first, second });
            };
            std::thread::spawn(course).join().unwrap();
        }

        /// So often it is looked, and in between it waited, and others of its process worked, for so many percent of the time.
        fn pass(&mut self, waited: u32, worked: u32, looks: u32) {
            self.pass_beside(waited, worked, looks, 50);
        }

        /// The same, the host being idle for so many percent of a CPU.
        fn pass_beside(&mut self, waited: u32, worked: u32, looks: u32, idle: u32) {
            for _ in 0..looks {
                self.worked += CROWDING_POLL * worked / 100;
                let (now, waited) =
                    (self.follow.checked + CROWDING_POLL, self.follow.waited + CROWDING_POLL * waited / 100);
                self.follow.check_crowding(now, waited, self.worked, self.follow.idle + CROWDING_POLL * idle / 100);
            }
        }

        /// So many asks by way of a CPU; where it may run then.
        fn come(&mut self, cpu: usize, asks: u32) -> CpuSet {
            if self.follow.follow_from.is_some_and(|from| self.follow.checked >= from) {
                (0..asks).for_each(|_| self.follow.came_by(cpu));
            }
            CpuSet::allowed()
        }
    }

    #[test]
    fn it_runs_where_asks_come_once_all_of_the_last_do() {
        Course::with_two_cpus(|mut course| {
            let (all, first, second) = (CpuSet::allowed(), course.first, course.second);
            course.pass(0, 0, 1);
            course.come(first, MOVE_AFTER - 1);
            course.come(second, 1);
            assert_eq!(course.come(first, 1), all);
            for cpu in [first, second, first] {
                assert_eq!(course.come(cpu, MOVE_AFTER), all.only(cpu));
            }
        });
    }

    #[test]
    fn beside_a_heavy_push_it_runs_anywhere() {
        Course::with_two_cpus(|mut course| {
            let (all, first) = (CpuSet::allowed(), course.first);
            assert_eq!(course.come(first, MOVE_AFTER), all, "what the push is like is not known yet");
            for _ in 0..2 {
                course.pass(0, 30, 1);
                assert_eq!(course.come(first, MOVE_AFTER), all.only(first));
                course.pass(0, 100, 1);
                assert_eq!(course.come(first, MOVE_AFTER), all);
            }
        });
    }

    #[test]
    fn a_cpu_that_others_want_is_left_to_them_for_a_while() {
        Course::with_two_cpus(|mut course| {
            let (all, first) = (CpuSet::allowed(), course.first);
            course.pass(90, 0, 1);
            assert_eq!(course.come(first, MOVE_AFTER), all, "there is no room anywhere");
            course.pass(10, 0, (RETRY_DELAY.as_millis() / CROWDING_POLL.as_millis()) as u32);
            assert_eq!(course.come(first, MOVE_AFTER), all.only(first));
            assert_eq!(course.come(first, 1), all.only(first));
            course.pass(30, 0, 1);
            assert_eq!(course.come(first, MOVE_AFTER), all);
            course.pass(0, 0, (RETRY_DELAY.as_millis() / CROWDING_POLL.as_millis()) as u32 - 1);
            assert_eq!(course.come(first, MOVE_AFTER), all);
            course.pass(0, 0, 1);
            assert_eq!(course.come(first, MOVE_AFTER), all.only(first));
        });
    }

    #[test]
    fn on_a_host_without_idle_cpus_it_runs_anywhere() {
        Course::with_two_cpus(|mut course| {
            let (all, first) = (CpuSet::allowed(), course.first);
            course.pass(0, 0, 1);
            assert_eq!(course.come(first, MOVE_AFTER), all.only(first));
            course.pass_beside(0, 0, 1, 5);
            assert_eq!(course.come(first, MOVE_AFTER), all);
        });
    }

    #[test]
    fn the_kernel_tells_by_which_cpu_an_ask_came() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut lane = listener.accept().unwrap().0;
        Course::with_two_cpus(move |course| {
            for cpu in [course.first, course.second] {
                course.follow.allowed.only(cpu).pin();
                sender.write_all(b"?").unwrap();
                lane.read_exact(&mut [0]).unwrap();
                assert_eq!(incoming_cpu(&lane), Some(cpu), "loopback is received where it is sent");
            }
        });
    }
}
