//! The bulk lanes of a destination: opened for what is lacking, taken in turn, opened anew when they are over and
//! something is still absent.

use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use tonic::Status;

use crate::arriving::{Lane, Pages};
use crate::commands::{Command, Commands};
use crate::inflow::{Inflow, Step};
use crate::lane::connect::Reached;
use crate::lane::{MOST_PAGES, PAGE};
use crate::proto::PageRange;
use crate::resolver::Resolver;

/// Failed attempts without a page between them, after which the link counts as lost.
const ATTEMPTS: u32 = 3;
/// So many of the largest frames are worth a wake-up.
const FRAMES_A_WAKE: u64 = 2;
/// How long less than that may lie unread.
const LOOK: Duration = Duration::from_millis(5);
/// Before push is tried again.
const PAUSE: Duration = Duration::from_millis(100);

/// The lanes, and what is wanted of them.
#[derive(Debug)]
pub struct Bulk {
    /// Wanted on so many lanes; 0: not wanted.
    pub wanted: usize,
    /// Attempts that failed since a page came.
    pub failures: u32,
    lanes: Vec<Inflow>,
    /// Agreed on, not connected yet.
    opening: usize,
    /// Lanes of an earlier attempt that connect late are not taken.
    generation: u64,
    turn: usize,
    due: Option<Instant>,
    commands: Commands,
    runtime: tokio::runtime::Handle,
}

impl Bulk {
    /// Not wanted. Lanes are connected on `runtime`, and come back as commands.
    pub fn new(commands: Commands, runtime: tokio::runtime::Handle) -> Self {
        let (lanes, opening, generation, turn, due) = (Vec::new(), 0, 0, 0, None);
        Self { wanted: 0, failures: 0, lanes, opening, generation, turn, due, commands, runtime }
    }

    /// No lane is open or being opened.
    pub fn is_closed(&self) -> bool {
        self.lanes.is_empty() && self.opening == 0
    }

    /// The open lanes.
    pub fn lanes(&self) -> impl Iterator<Item = &Inflow> {
        self.lanes.iter()
    }

    /// Opens lanes for what is lacking; nothing while they are not wanted.
    pub fn open(&mut self, source: &Reached, lacking: Vec<Pages>) {
        self.due = None;
        if self.wanted == 0 {
            return;
        }
        if lacking.is_empty() {
            // What is still missing was asked for: if its link breaks, push starts again.
            self.due = Some(Instant::now() + PAUSE);
            return;
        }
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
        match opened {
            Ok(stream) => {
                wake_seldom(&stream);
                self.lanes.push(Inflow::new(stream, Lane::Push));
                Ok(())
            }
            Err(status) => {
                self.failures += 1;
                self.over();
                Err(status)
            }
        }
    }

    /// One step of the lane whose turn it is, or of the next that has something.
    pub fn step(&mut self, resolver: &mut Resolver) -> Step {
        for _ in 0..self.lanes.len() {
            self.turn = (self.turn + 1) % self.lanes.len();
            let missing = resolver.table().counts().missing();
            match self.lanes[self.turn].step(resolver) {
                Step::Nothing => {}
                Step::Some => {
                    if resolver.table().counts().missing() < missing {
                        self.failures = 0;
                    }
                    return Step::Some;
                }
                step @ Step::Stopped(_) => return step,
                step @ (Step::Ended | Step::Broken { .. }) => {
                    self.lanes.swap_remove(self.turn);
                    if step != Step::Ended {
                        self.failures += 1;
                    }
                    self.over();
                    return step;
                }
            }
        }
        Step::Nothing
    }

    fn over(&mut self) {
        if self.is_closed() {
            self.due = Some(Instant::now() + PAUSE);
        }
    }

    /// Whether it has failed too often.
    pub fn failed_for_good(&self) -> bool {
        self.failures > ATTEMPTS
    }

    /// Whether to open lanes again now.
    pub fn is_due(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| due <= now)
    }

    /// When to look again though nothing wakes: lanes are to be opened, or too little has come on one to wake for.
    pub fn look_in(&self, now: Instant) -> Option<Duration> {
        let look = (!self.lanes.is_empty()).then_some(LOOK);
        self.due.map(|due| due.saturating_duration_since(now)).into_iter().chain(look).min()
    }

    /// Gives up all lanes.
    pub fn close(&mut self) {
        self.lanes.clear();
        self.generation += 1;
        self.opening = 0;
        self.due = None;
    }
}

/// Whoever sleeps on the lane is woken when so much of it has come that it is worth it, or it is closed: each wake-up costs
/// as much as many pages (socket(7), `SO_RCVLOWAT`). Less than that is found by [`Bulk::look_in`]. Where it cannot be set every
/// segment wakes.
fn wake_seldom(stream: &TcpStream) {
    let bytes = (FRAMES_A_WAKE * MOST_PAGES * PAGE) as libc::c_int;
    let (value, size) = ((&raw const bytes).cast(), size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: an int of the size that is said.
    unsafe { libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, size) };
}

/// Splits what is lacking into so many shares of about the same number of pages, none empty.
fn shares(lacking: &[Pages], lanes: usize) -> Vec<Vec<PageRange>> {
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
mod tests {
    use super::*;

    #[test]
    fn shares_hold_every_page_once() {
        let pages = |region, page, count| Pages { region, page, count };
        let range = |region, page, count| PageRange { region, page, count };
        assert!(shares(&[], 3).is_empty());
        assert_eq!(shares(&[pages(0, 5, 1)], 4), vec![vec![range(0, 5, 1)]]);
        let split = shares(&[pages(0, 0, 5), pages(1, 2, 4)], 2);
        assert_eq!(split, vec![vec![range(0, 0, 5)], vec![range(1, 2, 4)]]);
        let split = shares(&[pages(0, 0, 10)], 3);
        assert_eq!(split, vec![vec![range(0, 0, 4)], vec![range(0, 4, 4)], vec![range(0, 8, 2)]]);
    }
}
