//! A bulk lane of a destination: a thread that receives what is pushed and installs it, beside the page path.

use std::io;
use std::iter::once;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::destination::lanes::bulk_thread::BulkThread;
use crate::destination::lanes::receiver::{INSTALL_RETRY_DELAY, LaneReceiver, Step};
use crate::destination::pages::shared_pages::SharedPages;
use crate::lane::MAX_FRAME_PAGES;
use crate::layout::PAGE_SIZE;
use crate::layout::page_run::LaneKind;
use crate::sys::poll::wait_readable;
use crate::sys::tcp::set_receive_low_water;
use crate::sys::userfaultfd::Stop;
use crate::tuning::Tuning;

/// So many of the largest frames are worth a wake-up.
const FRAMES_A_WAKE: u64 = 2;
/// How long less than that may lie unread.
const RECV_POLL: Duration = Duration::from_millis(5);

/// What a lane has to say.
#[derive(Debug)]
pub enum LaneReport {
    /// Pages cannot be installed, for a reason that does not pass; it goes on with others. Said once for each reason, until
    /// something is installed.
    Stopped(Stop),
    /// It is over, by [`Step::Ended`] (also where nothing is missing any more) or [`Step::Broken`]; and whether a page came
    /// while it was open.
    Over(Step, bool),
}

/// An open lane. Dropped, it is closed, and nothing more of it is installed, also where a frame cannot be: nobody waits for
/// a frame that may never find its place.
#[derive(Debug)]
pub struct BulkLane {
    stream: TcpStream,
    closed: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl BulkLane {
    /// Takes what comes on the connection until it ends; `tell` is called by the lane's thread.
    ///
    /// # Errors
    /// No descriptor or thread can be had.
    pub fn start(
        stream: TcpStream,
        shared: Arc<SharedPages>,
        tuning: Tuning,
        tell: impl Fn(LaneReport) + Send + 'static,
    ) -> io::Result<Self> {
        wake_seldom(&stream);
        let taken = stream.try_clone()?;
        let closed = Arc::new(AtomicBool::new(false));
        let is_closed = closed.clone();
        let run = move || {
            tuning.lane_cpus.pin();
            let bulk_thread = BulkThread::new(tuning.real_time, shared.clone());
            receive_all(LaneReceiver::new(taken, LaneKind::Bulk), &shared, bulk_thread, &is_closed, tell);
        };
        let thread = std::thread::Builder::new().name("bulk".into()).spawn(run)?;
        Ok(Self { stream, closed, thread: Some(thread) })
    }
}

impl Drop for BulkLane {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Release);
        // Where it is closed already there is nothing to wake.
        let _ = self.stream.shutdown(Shutdown::Both);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("pager.lane_panicked");
        }
    }
}

fn receive_all(
    mut receiver: LaneReceiver,
    shared: &SharedPages,
    mut bulk_thread: BulkThread,
    closed: &AtomicBool,
    tell: impl Fn(LaneReport),
) {
    let events = shared.lock().events().clone();
    let (mut brought, mut said) = (false, None);
    loop {
        let before = shared.lock().table().counts().missing();
        let step = receiver.step(shared);
        let missing = shared.lock().table().counts().missing();
        brought |= missing < before;
        // Of a bad page that came; behind its vCPU.
        events.wake_watchers();
        match step {
            _ if missing == 0 => return tell(LaneReport::Over(Step::Ended, brought)),
            Step::Nothing => bulk_thread.slept(wait(&receiver)),
            Step::Progress => {
                said = None;
                bulk_thread.after_frame(receiver.is_in_place());
            }
            Step::Stopped(_) if closed.load(Ordering::Acquire) => return,
            Step::Stopped(stop) => {
                if !stop.passes() && said.replace(stop) != Some(stop) {
                    tell(LaneReport::Stopped(stop));
                }
                std::thread::sleep(INSTALL_RETRY_DELAY);
            }
            Step::Ended | Step::Broken { .. } => return tell(LaneReport::Over(step, brought)),
        }
    }
}

/// Until it is worth to look at the lane again; returns how long that was.
fn wait(receiver: &LaneReceiver) -> Duration {
    let began = Instant::now();
    wait_readable(once(receiver.as_fd()), Some(RECV_POLL));
    began.elapsed()
}

/// Whoever sleeps on the lane is woken when so much of it has come that it is worth it, or it is closed: each wake-up costs
/// as much as many pages (socket(7), `SO_RCVLOWAT`). Less than that is found after [`RECV_POLL`]. Where it cannot be set every
/// segment wakes.
fn wake_seldom(stream: &TcpStream) {
    if let Err(error) = set_receive_low_water(stream, FRAMES_A_WAKE * MAX_FRAME_PAGES * PAGE_SIZE) {
        tracing::debug!(%error, "lane.wakes_often");
    }
}

#[cfg(test)]
mod tests;
