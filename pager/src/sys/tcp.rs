//! Options and figures of a TCP connection (tcp(7), socket(7); include/uapi/linux/tcp.h, `struct tcp_info`).

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// Linux 6.15; not in the libc crate yet.
const TCP_RTO_MAX_MS: libc::c_int = 44;
/// Room for the fields that are read; the kernel fills as much as it knows.
const INFO_BYTES: usize = 168;

/// A connection as the kernel sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpInfo {
    /// Round trip, smoothed.
    pub rtt: Duration,
    /// By how much round trips differ from it, smoothed.
    pub rtt_deviation: Duration,
    /// The shortest round trip of late; zero before the first.
    pub min_rtt: Duration,
    /// Bytes sent and acknowledged, the first SYN among them.
    pub bytes_acked: u64,
    /// Bytes taken from the program and not sent yet.
    pub bytes_unsent: u32,
    /// Segments sent and not acknowledged.
    pub segments_unacked: u32,
    /// Bytes of contents that a segment sent has at most.
    pub mss: u32,
}

impl TcpInfo {
    /// Of a connected socket; `None` where the kernel tells less than that (before Linux 4.9).
    ///
    /// # Errors
    /// The kernel's error.
    pub fn of(socket: &impl AsRawFd) -> io::Result<Option<Self>> {
        let mut bytes = [0u8; INFO_BYTES];
        let mut size = INFO_BYTES as libc::socklen_t;
        let (level, what) = (libc::IPPROTO_TCP, libc::TCP_INFO);
        // SAFETY: the kernel writes at most as many bytes as said.
        let told =
            unsafe { libc::getsockopt(socket.as_raw_fd(), level, what, bytes.as_mut_ptr().cast(), &raw mut size) };
        match told {
            0 if (size as usize) < INFO_BYTES => Ok(None),
            0 => Ok(Some(Self::decode(&bytes))),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn decode(bytes: &[u8; INFO_BYTES]) -> Self {
        let u32_at = |at: usize| bytes[at..].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
        let u64_at = |at: usize| bytes[at..].first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
        let micros = |at| match u32_at(at) {
            u32::MAX => Duration::ZERO,
            us => Duration::from_micros(us.into()),
        };
        Self {
            rtt: micros(68),
            rtt_deviation: micros(72),
            min_rtt: micros(148),
            bytes_acked: u64_at(120),
            bytes_unsent: u32_at(144),
            segments_unacked: u32_at(24),
            mss: u32_at(16),
        }
    }
}

fn set<T>(socket: &impl AsRawFd, level: libc::c_int, what: libc::c_int, value: T) -> io::Result<()> {
    let size = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads as many bytes as said, of a plain number.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), level, what, (&raw const value).cast(), size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn millis(time: Duration) -> libc::c_int {
    time.as_millis().try_into().unwrap_or(libc::c_int::MAX)
}

/// Sets how long sent bytes may stay without an acknowledgement before the connection ends, for any number of
/// retransmissions (`TCP_USER_TIMEOUT`).
///
/// # Errors
/// The kernel's error.
pub fn set_user_timeout(socket: &impl AsRawFd, time: Duration) -> io::Result<()> {
    set(socket, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, millis(time))
}

/// Probes a connection that is silent for so long, and then as often, so that it ends with its other end.
///
/// # Errors
/// The kernel's error.
pub fn set_keepalive(socket: &impl AsRawFd, time: Duration) -> io::Result<()> {
    let seconds = libc::c_int::try_from(time.as_secs().max(1)).unwrap_or(libc::c_int::MAX);
    set(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1 as libc::c_int)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, seconds)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, seconds)
}

/// Sets the longest pause between two retransmissions; without it pauses double up to two minutes (`TCP_RTO_MAX_MS`).
///
/// # Errors
/// `ENOPROTOOPT` before Linux 6.15.
pub fn set_rto_max(socket: &impl AsRawFd, time: Duration) -> io::Result<()> {
    set(socket, libc::IPPROTO_TCP, TCP_RTO_MAX_MS, millis(time))
}

/// Spaces out packets to at most so many bytes a second (`SO_MAX_PACING_RATE`); `None`: no limit.
///
/// # Errors
/// The kernel's error.
pub fn set_max_pacing_rate(socket: &impl AsRawFd, bytes_per_s: Option<u64>) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, bytes_per_s.unwrap_or(u64::MAX))
}

/// Lets queues of this host send the packets before other traffic (`SO_PRIORITY` 6, tc-prio(8)).
///
/// # Errors
/// The kernel's error.
pub fn set_interactive(socket: &impl AsRawFd) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_PRIORITY, 6 as libc::c_int)
}

/// Wakes a thread that sleeps on the socket once this many bytes lie unread, or the peer closes it (`SO_RCVLOWAT`).
///
/// # Errors
/// The kernel's error.
pub fn set_receive_low_water(socket: &impl AsRawFd, bytes: u64) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).map_err(io::Error::other)?;
    set(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, bytes)
}

#[cfg(test)]
mod tests;
