//! The bulk lanes of a destination: opened for what is lacking, each with a thread, opened anew when they are over and something
//! is still absent.

use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::Status;

use crate::destination::command::{Command, Commands};
use crate::destination::lanes::bulk_lane::{BulkLane, LaneReport};
use crate::destination::lanes::receiver::Step;
use crate::destination::pages::shared_pages::SharedPages;
use crate::lane::connect::SourceConnection;
use crate::layout::page_run::PageRun;
use crate::proto::PageRange;
use crate::tuning::Tuning;

/// Failed attempts without a page between them, after which the link counts as lost.
const MAX_FAILURES: u32 = 3;
/// Before push is tried again.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// The lanes, and what is wanted of them.
#[derive(Debug)]
pub struct BulkLanes {
    /// Wanted on so many lanes; 0: not wanted.
    pub wanted: usize,
    /// Attempts that failed since a page came.
    pub failures: u32,
    /// With those whose thread is over.
    lanes: Vec<BulkLane>,
    /// How many are not over.
    open: usize,
    /// Agreed on, not connected yet.
    opening: usize,
    /// Lanes of an earlier attempt that connect late are not taken.
    generation: u64,
    due: Option<Instant>,
    commands: Commands,
    runtime: tokio::runtime::Handle,
    shared: Arc<SharedPages>,
    tuning: Tuning,
}

impl BulkLanes {
    /// Not wanted. Lanes are connected on `runtime`, and come back as commands.
    pub fn new(commands: Commands, runtime: tokio::runtime::Handle, shared: Arc<SharedPages>, tuning: Tuning) -> Self {
        let (lanes, open, opening, generation, due) = (Vec::new(), 0, 0, 0, None);
        Self { wanted: 0, failures: 0, lanes, open, opening, generation, due, commands, runtime, shared, tuning }
    }

    /// No lane is open or being opened.
    pub fn is_closed(&self) -> bool {
        self.open == 0 && self.opening == 0
    }

    /// Whether a lane is open.
    pub fn is_open(&self) -> bool {
        self.open > 0
    }

    /// Opens lanes for what is lacking; nothing while they are not wanted.
    pub fn open(&mut self, source: &SourceConnection, lacking: Vec<PageRun>) {
        self.due = None;
        if self.wanted == 0 {
            return;
        }
        if lacking.is_empty() {
            // What is still missing was asked for: if its link breaks, push starts again.
            self.due = Some(Instant::now() + RETRY_DELAY);
            return;
        }
        self.lanes.clear();
        self.generation += 1;
        let generation = self.generation;
        for share in shares(&lacking, self.wanted) {
            self.opening += 1;
            let (source, commands) = (source.clone(), self.commands.clone());
            self.runtime.spawn(async move {
                let opened = source.bulk(share).await;
                commands.send(Command::BulkOpened(generation, opened));
            });
        }
    }

    /// A lane is connected, or could not be.
    ///
    /// # Errors
    /// The status of the attempt, if it is still the present one.
    pub fn opened(&mut self, generation: u64, opened: Result<TcpStream, Status>) -> Result<(), Status> {
        if generation != self.generation || self.opening == 0 {
            return Ok(());
        }
        self.opening -= 1;
        let lane = opened.and_then(|stream| {
            let commands = self.commands.clone();
            let tell = move |report| commands.send(Command::BulkReport(generation, report));
            BulkLane::start(stream, self.shared.clone(), self.tuning.clone(), tell)
                .map_err(|error| Status::resource_exhausted(format!("a thread for a lane: {error}")))
        });
        match lane {
            Ok(lane) => {
                self.lanes.push(lane);
                self.open += 1;
                Ok(())
            }
            Err(status) => {
                self.failures += 1;
                self.over();
                Err(status)
            }
        }
    }

    /// What a lane said, if it is of the present attempt.
    pub fn reported(&mut self, generation: u64, report: LaneReport) -> Option<Step> {
        if generation != self.generation || self.open == 0 {
            return None;
        }
        let (step, brought) = match report {
            LaneReport::Stopped(stop) => return Some(Step::Stopped(stop)),
            LaneReport::Over(step, brought) => (step, brought),
        };
        self.open -= 1;
        if brought {
            self.failures = 0;
        }
        if step != Step::Ended {
            self.failures += 1;
        }
        self.over();
        Some(step)
    }

    fn over(&mut self) {
        if self.is_closed() {
            self.due = Some(Instant::now() + RETRY_DELAY);
        }
    }

    /// Whether it has failed too often.
    pub fn failed_for_good(&self) -> bool {
        self.failures > MAX_FAILURES
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
        self.generation += 1;
        self.opening = 0;
        self.due = None;
    }
}

/// Splits what is lacking into so many shares of about the same number of pages, none empty.
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
