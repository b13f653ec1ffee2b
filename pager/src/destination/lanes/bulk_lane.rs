//! A bulk lane of a destination: a thread that receives what is pushed and installs it, beside the page path.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::destination::lanes::receiver::{Inflow, STOPPED_PAUSE, Step};
use crate::destination::pages::shared_pages::Shared;
use crate::lane::{MOST_PAGES, PAGE};
use crate::layout::page_run::Lane;
use crate::sched::priority;
use crate::sched::rt_throttle::{REST, Rests};
use crate::sched::vcpu_avoidance::Aside;
use crate::sys::userfaultfd::Stop;
use crate::tuning::Tuning;

/// So many of the largest frames are worth a wake-up.
const FRAMES_A_WAKE: u64 = 2;
/// How long less than that may lie unread.
const LOOK: Duration = Duration::from_millis(5);

/// What a lane has to say.
#[derive(Debug, PartialEq, Eq)]
pub enum Report {
    /// Pages cannot be installed, for a reason that does not pass; it goes on with others.
    Stopped(Stop),
    /// It is over, by [`Step::Ended`] (also where nothing is missing any more) or [`Step::Broken`]; and whether a page came
    /// while it was open.
    Over(Step, bool),
}

/// An open lane. Dropped, it is closed, and nothing more of it is installed.
#[derive(Debug)]
pub struct PushedLane {
    stream: TcpStream,
    thread: Option<JoinHandle<()>>,
}

impl PushedLane {
    /// Takes what comes on the connection until it ends; `tell` is called by the lane's thread.
    ///
    /// # Errors
    /// No descriptor or thread can be had.
    pub fn start(
        stream: TcpStream,
        shared: Arc<Shared>,
        tuning: Tuning,
        tell: impl Fn(Report) + Send + 'static,
    ) -> io::Result<Self> {
        wake_seldom(&stream);
        let taken = stream.try_clone()?;
        let run = move || {
            tuning.lane_cpus.pin();
            let standing = Standing::new(tuning.real_time, shared.clone());
            take_all(Inflow::new(taken, Lane::Push), &shared, standing, tell);
        };
        let thread = std::thread::Builder::new().name("bulk".into()).spawn(run)?;
        Ok(Self { stream, thread: Some(thread) })
    }
}

impl Drop for PushedLane {
    fn drop(&mut self) {
        // Where it is closed already there is nothing to wake.
        let _ = self.stream.shutdown(Shutdown::Both);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("pager.lane_panicked");
        }
    }
}

fn take_all(mut inflow: Inflow, shared: &Shared, mut standing: Standing, tell: impl Fn(Report)) {
    let events = shared.lock().events().clone();
    let mut brought = false;
    loop {
        let before = shared.lock().table().counts().missing();
        let step = inflow.step(shared);
        let missing = shared.lock().table().counts().missing();
        brought |= missing < before;
        // Of a bad page that came; behind its vCPU.
        events.tell();
        match step {
            _ if missing == 0 => return tell(Report::Over(Step::Ended, brought)),
            Step::Nothing => standing.slept(wait(&inflow)),
            Step::Some => standing.leave_others_their_share(inflow.is_in_place()),
            Step::Stopped(stop) => {
                if !stop.passes() {
                    tell(Report::Stopped(stop));
                }
                std::thread::sleep(STOPPED_PAUSE);
            }
            Step::Ended | Step::Broken { .. } => return tell(Report::Over(step, brought)),
        }
    }
}

/// Until it is worth to look at the lane again; returns how long that was.
fn wait(inflow: &Inflow) -> Duration {
    let mut lane = libc::pollfd { fd: inflow.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let began = Instant::now();
    // SAFETY: one pollfd.
    unsafe { libc::poll(&raw mut lane, 1, LOOK.as_millis() as libc::c_int) };
    began.elapsed()
}

/// Whoever sleeps on the lane is woken when so much of it has come that it is worth it, or it is closed: each wake-up costs
/// as much as many pages (socket(7), `SO_RCVLOWAT`). Less than that is found after [`LOOK`]. Where it cannot be set every
/// segment wakes.
fn wake_seldom(stream: &TcpStream) {
    let bytes = (FRAMES_A_WAKE * MOST_PAGES * PAGE) as libc::c_int;
    let (value, size) = ((&raw const bytes).cast(), size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: an int of the size that is said.
    unsafe { libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, size) };
}

/// How the thread stands against the others for a core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stand {
    /// Before all; it rests.
    First,
    /// Favoured.
    Favoured,
    /// As any other; it gives way.
    Fair,
}

/// A lane that is received in place mostly waits for the source, so it may go before all others; one whose pages have to be
/// copied would keep them from its core without end. Where the push is light nobody is in its way.
#[derive(Debug)]
struct Standing {
    real_time: bool,
    /// Whether it may go before others, and is received in place, by which it stands as it does.
    why: (bool, bool),
    stand: Stand,
    rests: Rests,
    shared: Arc<Shared>,
    faults: u64,
    /// Until when its work is accounted for.
    accounted: Instant,
    aside: Aside,
}

impl Standing {
    fn new(real_time: bool, shared: Arc<Shared>) -> Self {
        let (faults, accounted) = (shared.faults(), Instant::now());
        let why = (real_time && shared.is_heavy(), false);
        let aside = Aside::new(shared.lock().table().bound_to());
        Self { real_time, why, stand: Self::take(why), rests: Rests::default(), shared, faults, accounted, aside }
    }

    fn take((ahead, in_place): (bool, bool)) -> Stand {
        if ahead && in_place && priority::at_once() {
            return Stand::First;
        }
        if ahead && priority::urgent() {
            return Stand::Favoured;
        }
        priority::bulk();
        Stand::Fair
    }

    /// Until now, of which it slept so long.
    fn slept(&mut self, time: Duration) {
        self.rests.slept(time);
        self.account(Instant::now(), time);
    }

    fn account(&mut self, now: Instant, slept: Duration) {
        self.shared.note_work(now.saturating_duration_since(self.accounted).saturating_sub(slept));
        self.accounted = now;
    }

    /// After a frame.
    fn leave_others_their_share(&mut self, in_place: bool) {
        let now = Instant::now();
        self.account(now, Duration::ZERO);
        let why = (self.real_time && self.shared.is_heavy(), in_place);
        if why != self.why {
            (self.why, self.stand) = (why, Self::take(why));
            self.aside.end();
        }
        match self.stand {
            Stand::First => {
                let faults = self.shared.faults();
                if faults != self.faults {
                    self.faults = faults;
                    self.rests.fault(now);
                    self.aside.step(now, self.shared.faulting_thread());
                }
                if self.rests.after_frame(now) {
                    std::thread::sleep(REST);
                    self.accounted = Instant::now();
                }
            }
            Stand::Favoured => {}
            Stand::Fair => priority::give_way(),
        }
    }
}
