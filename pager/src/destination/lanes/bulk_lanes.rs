//! The bulk lanes of a destination. They are opened for the absent pages, each with a thread. If they end before every page
//! has come, they are opened anew.

use std::fmt;
use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::destination::lanes::bulk_lane::{BulkLane, LaneReport};
use crate::destination::lanes::receiver::{LaneFailure, Step};
use crate::destination::pages::shared_pages::SharedPages;
use crate::lane::connect::{ConnectError, SourceConnection};
use crate::layout::page_run::PageRun;
use crate::proto::PageRange;
use crate::sys::userfaultfd::Stop;
use crate::tuning::Tuning;

/// Failed attempts without a page between them, before the push counts as failing.
const MAX_FAILURES: u32 = 3;
/// Pause before the push is tried again; twice as long after each failed attempt.
const RETRY_DELAY: Duration = Duration::from_millis(100);
/// The longest delay is so many times the shortest: 6.4 s.
const MAX_DOUBLINGS: u32 = 6;

/// An event of a lane, with the number of the lane's attempt.
#[derive(Debug)]
pub enum BulkEvent {
    /// The lane is connected, or could not be.
    Opened(u64, Result<TcpStream, ConnectError>),
    /// The lane's thread reports.
    Reported(u64, LaneReport),
}

/// The effect of an event on the link.
#[derive(Debug)]
pub enum BulkOutcome {
    /// None: the push continues, or has ended well.
    GoesOn,
    /// A page cannot be installed.
    Stopped(Stop),
    /// The source does not keep to the contract.
    Untrusted(LaneFailure),
    /// A lane could not be opened, or broke.
    Lost(BulkError),
}

/// Why a lane is lost.
#[derive(Debug, thiserror::Error)]
pub enum BulkError {
    /// It could not be opened.
    #[error(transparent)]
    Connect(ConnectError),
    /// It has no thread.
    #[error("a thread for a lane: {0}")]
    Thread(#[source] io::Error),
    /// It broke.
    #[error(transparent)]
    Lane(LaneFailure),
}

/// Hands an event to the fault thread.
pub type SendEvent = Arc<dyn Fn(BulkEvent) + Send + Sync>;

/// The lanes, and how many are wanted.
pub struct BulkLanes {
    /// Wanted on so many lanes; 0: not wanted.
    pub wanted: usize,
    /// Attempts that failed since a page came. However many lanes fail in one, it is one.
    failures: u32,
    /// Whether a lane of the present attempt failed, and whether one brought a page.
    failed: bool,
    brought: bool,
    /// Includes lanes with an ended thread.
    lanes: Vec<BulkLane>,
    /// Number of lanes that have not ended.
    open: usize,
    /// Agreed on, not connected yet.
    opening: usize,
    /// Lanes of an earlier attempt that connect late are not taken.
    attempt: u64,
    due: Option<Instant>,
    send: SendEvent,
    runtime: tokio::runtime::Handle,
    shared: Arc<SharedPages>,
    tuning: Tuning,
}

impl fmt::Debug for BulkLanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BulkLanes").field("wanted", &self.wanted).field("open", &self.open).finish_non_exhaustive()
    }
}

impl BulkLanes {
    /// Not wanted. Lanes are connected on `runtime`; their events go to `send`.
    pub fn new(send: SendEvent, runtime: tokio::runtime::Handle, shared: Arc<SharedPages>, tuning: Tuning) -> Self {
        let (lanes, open, opening, attempt, due) = (Vec::new(), 0, 0, 0, None);
        let (failures, failed, brought) = (0, false, false);
        Self { wanted: 0, failures, failed, brought, lanes, open, opening, attempt, due, send, runtime, shared, tuning }
    }

    /// No lane is open or being opened.
    pub fn is_closed(&self) -> bool {
        self.open == 0 && self.opening == 0
    }

    /// Whether a lane is open.
    pub fn is_open(&self) -> bool {
        self.open > 0
    }

    /// Opens lanes for the lacking pages; does nothing while no lane is wanted.
    pub fn open(&mut self, source: &SourceConnection, lacking: Vec<PageRun>) {
        self.due = None;
        if self.wanted == 0 {
            return;
        }
        if lacking.is_empty() {
            // The missing pages were requested: if the link breaks, the push starts again.
            self.due = Some(Instant::now() + RETRY_DELAY);
            return;
        }
        self.lanes.clear();
        self.attempt += 1;
        (self.failed, self.brought) = (false, false);
        let attempt = self.attempt;
        for share in shares(&lacking, self.wanted) {
            self.opening += 1;
            let (source, send) = (source.clone(), self.send.clone());
            self.runtime.spawn(async move {
                let opened = source.bulk(share).await;
                send(BulkEvent::Opened(attempt, opened));
            });
        }
    }

    /// Takes an event; those of earlier attempts change nothing.
    pub fn event(&mut self, event: BulkEvent) -> BulkOutcome {
        match event {
            BulkEvent::Opened(attempt, opened) if attempt == self.attempt && self.opening > 0 => self.opened(opened),
            BulkEvent::Reported(attempt, report) if attempt == self.attempt && self.open > 0 => self.reported(report),
            BulkEvent::Opened(..) | BulkEvent::Reported(..) => BulkOutcome::GoesOn,
        }
    }

    fn opened(&mut self, opened: Result<TcpStream, ConnectError>) -> BulkOutcome {
        self.opening -= 1;
        let lane = opened.map_err(BulkError::Connect).and_then(|stream| {
            let (send, attempt) = (self.send.clone(), self.attempt);
            let tell = move |report| send(BulkEvent::Reported(attempt, report));
            BulkLane::start(stream, self.shared.clone(), self.tuning.clone(), tell).map_err(BulkError::Thread)
        });
        match lane {
            Ok(lane) => {
                self.lanes.push(lane);
                self.open += 1;
                BulkOutcome::GoesOn
            }
            Err(error) => {
                self.failed = true;
                self.schedule_retry();
                BulkOutcome::Lost(error)
            }
        }
    }

    fn reported(&mut self, report: LaneReport) -> BulkOutcome {
        let (step, brought) = match report {
            LaneReport::Stopped(stop) => return BulkOutcome::Stopped(stop),
            LaneReport::Over(step, brought) => (step, brought),
        };
        self.open -= 1;
        self.brought |= brought;
        self.failed |= !matches!(step, Step::Ended);
        self.schedule_retry();
        match step {
            Step::Nothing | Step::Progress | Step::Ended => BulkOutcome::GoesOn,
            Step::Stopped(stop) => BulkOutcome::Stopped(stop),
            Step::Broken(failure) if failure.is_nonsense() => BulkOutcome::Untrusted(failure),
            Step::Broken(failure) => BulkOutcome::Lost(BulkError::Lane(failure)),
        }
    }

    fn schedule_retry(&mut self) {
        if !self.is_closed() {
            return;
        }
        self.failures = match (self.failed, self.brought) {
            (true, true) => 1,
            (true, false) => self.failures.saturating_add(1),
            (false, _) => 0,
        };
        self.due = Some(Instant::now() + retry_delay(self.failures));
    }

    /// Whether it fails again and again. It is tried further.
    pub fn is_failing(&self) -> bool {
        self.failures >= MAX_FAILURES
    }

    /// Failed attempts of another source do not count.
    pub fn forget_failures(&mut self) {
        self.failures = 0;
    }

    /// Whether to open lanes again now.
    pub fn is_due(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| due <= now)
    }

    /// When lanes are to be opened again.
    pub fn due_in(&self, now: Instant) -> Option<Duration> {
        self.due.map(|due| due.saturating_duration_since(now))
    }

    /// Gives up all lanes: nothing more of them is installed.
    pub fn close(&mut self) {
        self.lanes.clear();
        self.open = 0;
        self.attempt += 1;
        self.opening = 0;
        self.due = None;
    }
}

fn retry_delay(failures: u32) -> Duration {
    RETRY_DELAY * (1 << failures.saturating_sub(1).min(MAX_DOUBLINGS))
}

/// Splits the absent pages into so many shares of about the same number of pages, none empty.
fn shares(lacking: &[PageRun], lanes: usize) -> Vec<Vec<PageRange>> {
    let total: u64 = lacking.iter().map(|r| r.count).sum();
    let each = total.div_ceil(lanes.max(1) as u64).max(1);
    let mut shares: Vec<Vec<PageRange>> = Vec::new();
    let mut room = 0;
    for run in lacking {
        let (mut page, end) = (run.page, run.page + run.count);
        while page < end {
            if room == 0 {
                shares.push(Vec::new());
                room = each;
            }
            let count = room.min(end - page);
            if let Some(share) = shares.last_mut() {
                share.push(PageRange { region: run.region, page, count });
            }
            page += count;
            room -= count;
        }
    }
    shares
}

#[cfg(test)]
mod tests;
