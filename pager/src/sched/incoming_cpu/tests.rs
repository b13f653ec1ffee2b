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
        let mut numbers = (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| allowed.only(*cpu) != CpuSet::default());
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
fn during_a_heavy_push_it_runs_anywhere() {
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
