//! What an operator may set of a pager: where its threads run, how long they spin, of which pages a destination makes
//! memory, how lanes are paced.

use std::os::fd::AsRawFd;
use std::str::FromStr;
use std::time::Duration;

use crate::sched::priority;

/// How a pager is tuned.
#[derive(Debug, Clone, Default)]
pub struct Tuning {
    /// How long the thread that resolves faults looks for the next before it sleeps; longer for an answer.
    pub spin: Duration,
    /// Of the threads between a fault and its answer: that which resolves faults on a destination, a source's urgent lane.
    pub page_path_cpus: CpuList,
    /// Of the threads of bulk lanes, on either end.
    pub lane_cpus: CpuList,
    /// The page path, and a lane that is received in place, run as soon as they wake while there is a heavy push, where the
    /// process may have that.
    pub real_time: bool,
    /// The host's processors do not sleep while a guest asks for pages, where the process may have that.
    pub keep_awake: bool,
    /// Memory of a destination that is made ready is made of huge pages where they cost no more.
    pub huge_pages: bool,
    /// How what is sent on lanes is paced (tcp(7), `TCP_CONGESTION`); empty: as the host does it.
    pub congestion_control: String,
}

impl Tuning {
    /// The calling thread resolves faults.
    pub fn enter_page_path(&self) {
        priority::urgent();
        self.page_path_cpus.pin();
    }

    /// There is a heavy push beside the page path from now on. Whether nobody puts it aside: it must not spin then.
    pub fn enter_heavy_push(&self) -> bool {
        self.real_time && priority::at_once()
    }

    /// The opposite of [`Self::enter_heavy_push`].
    pub fn leave_heavy_push(&self) {
        priority::urgent();
    }

    /// What is sent on the connections of this socket is paced as wanted; where the host does not know that way, as the host
    /// does it. To be called before there is a connection: one that began with `bbr` keeps the timer with which that paces,
    /// whatever it is paced by afterwards (`sk_pacing_status`, net/ipv4/tcp_bbr.c).
    pub fn pace(&self, socket: &impl AsRawFd) {
        let name = self.congestion_control.as_bytes();
        if name.is_empty() {
            return;
        }
        let (level, what, size) = (libc::IPPROTO_TCP, libc::TCP_CONGESTION, name.len() as libc::socklen_t);
        // SAFETY: the kernel reads as many bytes as said.
        if unsafe { libc::setsockopt(socket.as_raw_fd(), level, what, name.as_ptr().cast(), size) } != 0 {
            let error = std::io::Error::last_os_error();
            tracing::warn!(congestion_control = self.congestion_control, %error, "lane.not_paced");
        }
    }
}

/// CPUs by number, e.g. `2-3,7`; none: anywhere.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuList(Vec<usize>);

impl CpuList {
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
pub(crate) mod tests {
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
    fn only_cpus_that_are_allowed_are_named() {
        let all = CpuList::each_allowed();
        assert_eq!(all.len(), std::thread::available_parallelism().unwrap().get());
        let last = all.last().unwrap().clone();
        let there = std::thread::spawn(move || {
            last.pin();
            (CpuList::each_allowed(), last)
        });
        let (allowed, last) = there.join().unwrap();
        assert_eq!(allowed, [last]);
    }

    pub(crate) fn paced_by(socket: &impl AsRawFd) -> String {
        let mut name = [0u8; 16];
        let mut size = name.len() as libc::socklen_t;
        let (level, what) = (libc::IPPROTO_TCP, libc::TCP_CONGESTION);
        let (into, room) = (name.as_mut_ptr().cast(), &raw mut size);
        // SAFETY: the kernel writes at most as many bytes as said.
        assert_eq!(unsafe { libc::getsockopt(socket.as_raw_fd(), level, what, into, room) }, 0);
        String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned()
    }

    #[test]
    fn what_a_listener_accepts_is_paced_as_wanted_or_as_the_host_does_it() {
        let accepted = |wanted: &str| {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            Tuning { congestion_control: wanted.into(), ..Tuning::default() }.pace(&listener);
            let _other = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            paced_by(&listener.accept().unwrap().0)
        };
        // Every kernel has this one.
        assert_eq!(accepted("reno"), "reno");
        assert_eq!(accepted("no-such-way"), accepted(""));
    }

    #[test]
    fn a_placed_thread_runs_there_and_only_it() {
        let on = |cpus: &str| {
            let list: CpuList = cpus.parse().unwrap();
            std::thread::spawn(move || {
                list.pin();
                CpuList::each_allowed().len()
            })
            .join()
            .unwrap()
        };
        assert_eq!(on("0"), 1);
        assert_eq!(on(""), std::thread::available_parallelism().unwrap().get());
    }
}
