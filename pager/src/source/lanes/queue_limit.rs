//! Keeps the queue of the network short, if the network limits the push. Pure: the caller gives time and figures.
//!
//! A loss-based congestion control fills the queue before the slowest link, and an answer to a vCPU waits behind it. The
//! length of the queue is the round trip less the shortest round trip. While it is long and bytes wait in the socket, the
//! pace of a bulk lane is below the rate that gets through. While it is short, the pace rises. If a CPU or the
//! destination limits the push, the round trip stays short, and there is no pace.
//!
//! Others may fill the same queue, and a lane that yields to them yields for ever. So the pace never goes below half of
//! the rate that got through before. If that does not shorten the queue, there is no pace for a while.

use std::time::{Duration, Instant};

use crate::sys::tcp::TcpInfo;

/// A look costs a system call.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// A queue of this length does not matter, nor one of half a round trip.
const SHORT_QUEUE: Duration = Duration::from_millis(1);
/// Number of consecutive long queues before there is a pace.
const LONG_LOOKS: u32 = 2;
/// A queue of this lane is this many times the deviation of round trips. A shorter one is jitter of the path.
const DEVIATIONS: u32 = 4;
/// Others fill the queue if the lowest pace does not shorten it within this time.
const NOT_OURS_AFTER: Duration = Duration::from_secs(2);
/// How long the lane has no pace then.
const LET_GO: Duration = Duration::from_secs(10);

/// A look at a connection.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    /// Round trip, smoothed.
    pub rtt: Duration,
    /// Its deviation.
    pub rtt_deviation: Duration,
    /// The shortest of late.
    pub min_rtt: Duration,
    /// Bytes that got through, ever.
    pub bytes_acked: u64,
    /// Bytes wait in the socket.
    pub waits: bool,
}

impl From<TcpInfo> for Look {
    fn from(info: TcpInfo) -> Self {
        let TcpInfo { rtt, rtt_deviation, min_rtt, bytes_acked, bytes_unsent, .. } = info;
        Self { rtt, rtt_deviation, min_rtt, bytes_acked, waits: bytes_unsent > 0 }
    }
}

/// How long the queue is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Queue {
    Short,
    Fair,
    Long,
    VeryLong,
}

/// The pace of one bulk lane.
#[derive(Debug)]
pub struct QueueLimit {
    /// Bytes a second; `None`: no pace.
    pace: Option<u64>,
    looked: Instant,
    rtt: Duration,
    acked: u64,
    long_looks: u32,
    /// The highest rate since there is a pace, bytes a second.
    best: u64,
    /// Time with a long queue at the lowest pace, less the time at higher paces.
    futile: Duration,
    /// No pace before this time.
    let_go_until: Instant,
}

impl QueueLimit {
    /// No pace yet.
    pub fn new(now: Instant) -> Self {
        let (rtt, futile) = (Duration::ZERO, Duration::ZERO);
        Self { pace: None, looked: now, rtt, acked: 0, long_looks: 0, best: 0, futile, let_go_until: now }
    }

    /// Whether a measurement is due: every few milliseconds, at most one in a round trip.
    pub fn is_due(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.looked) >= LOOK_EVERY.max(self.rtt)
    }

    /// Bytes a second; `None`: no pace.
    pub fn pace(&self) -> Option<u64> {
        self.pace
    }

    /// Takes a measurement. Returns the new pace if it has changed.
    pub fn look(&mut self, now: Instant, look: Look) -> Option<Option<u64>> {
        let time = now.saturating_duration_since(self.looked);
        let through = rate(look.bytes_acked.saturating_sub(self.acked), time);
        (self.looked, self.rtt, self.acked) = (now, look.rtt, look.bytes_acked);
        let before = self.pace;
        self.pace = match (before, queue(&look)) {
            (None, queue) => self.begin(now, &look, queue, through),
            (Some(pace), queue) => self.adapt(now, time, pace, queue, through),
        };
        (self.pace != before).then_some(self.pace)
    }

    fn begin(&mut self, now: Instant, look: &Look, queue: Queue, through: u64) -> Option<u64> {
        let is_ours = look.waits && look.rtt.saturating_sub(look.min_rtt) > look.rtt_deviation * DEVIATIONS;
        let is_long = matches!(queue, Queue::Long | Queue::VeryLong);
        self.long_looks = if is_ours && is_long && now >= self.let_go_until { self.long_looks + 1 } else { 0 };
        if self.long_looks < LONG_LOOKS || through == 0 {
            return None;
        }
        (self.best, self.futile, self.long_looks) = (through, Duration::ZERO, 0);
        Some(through / 2)
    }

    fn adapt(&mut self, now: Instant, time: Duration, pace: u64, queue: Queue, through: u64) -> Option<u64> {
        self.best = self.best.max(through);
        if pace > self.best.saturating_mul(4) {
            return None; // something else is the limit now
        }
        let least = (self.best / 2).max(1);
        let wanted = match queue {
            Queue::Short => pace + pace / 8,
            Queue::Fair => pace + pace / 64,
            Queue::Long => pace.min(through) - pace.min(through) / 8,
            Queue::VeryLong => pace.min(through) / 2,
        };
        self.futile = if wanted < least { self.futile + time } else { self.futile.saturating_sub(time) };
        if self.futile >= NOT_OURS_AFTER {
            self.let_go_until = now + LET_GO;
            return None;
        }
        Some(wanted.max(least))
    }
}

fn queue(look: &Look) -> Queue {
    let queue = look.rtt.saturating_sub(look.min_rtt);
    let fair = SHORT_QUEUE.max(look.min_rtt / 2);
    match queue {
        queue if queue > fair * 4 => Queue::VeryLong,
        queue if queue > fair => Queue::Long,
        queue if queue > fair / 2 => Queue::Fair,
        _ => Queue::Short,
    }
}

fn rate(bytes: u64, time: Duration) -> u64 {
    (bytes as f64 / time.as_secs_f64().max(1e-6)) as u64
}

#[cfg(test)]
mod tests;
