//! What an operator may set of a pager: where its threads run, how long they spin, of which pages a destination makes
//! memory, how lanes are paced.

use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::sched::cpu_set::CpuSet;
use crate::sched::priority;

/// How a pager is tuned.
#[derive(Debug, Clone, Default)]
pub struct Tuning {
    /// How long the thread that resolves faults looks for the next before it sleeps; longer for an answer.
    pub spin: Duration,
    /// Of the threads between a fault and its answer: that which resolves faults on a destination, a source's urgent lane.
    pub page_path_cpus: CpuSet,
    /// Of the threads of bulk lanes, on either end.
    pub lane_cpus: CpuSet,
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
        priority::favoured();
        self.page_path_cpus.pin();
    }

    /// There is a heavy push beside the page path from now on. Whether nobody puts it aside: it must not spin then.
    pub fn enter_heavy_push(&self) -> bool {
        self.real_time && priority::realtime()
    }

    /// The opposite of [`Self::enter_heavy_push`].
    pub fn leave_heavy_push(&self) {
        priority::favoured();
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

#[cfg(test)]
pub(crate) mod tests;
