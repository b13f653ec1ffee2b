//! The receiving end of a lane, in small steps: a frame's header, its bytes, its installation. None of them waits for the lane.
//!
//! One call receives the bytes of a frame and the header of the next. A pushed frame is received in place, where that can be
//! done and all of the frame has come. Any other goes into one buffer, which stays in the processor's cache; so does a reply on
//! the urgent lane, with its own header.
//!
//! The buffer also takes the pages of a frame that are not wanted, and keeps a frame that cannot be installed now (events to be
//! read first, no memory): the lane is not read further until it can. A page that was received in place and cannot be mapped
//! now is mapped when it is touched. Nothing of a frame is claimed before all of it is here: a lane that breaks in the middle
//! leaves nothing behind.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::io::ioctl_fionread;

use crate::destination::pages::resolver::OutsideLayout;
use crate::destination::pages::shared_pages::SharedPages;
use crate::lane::MAX_FRAME_PAGES;
use crate::lane::frame::{BadFrame, FrameHeader, FrameKind, HEADER_BYTES};
use crate::layout::PAGE_SIZE;
use crate::layout::page_run::{LaneKind, PageRun, PoisonInfo};
use crate::sys::iovecs::{IoVecs, ReceivePlaces};
use crate::sys::userfaultfd::Stop;

/// Pages that are dealt with in one step where they bring no bytes.
const MAX_PAGES_WITHOUT_DATA: u64 = 4096;

/// Pieces of huge pages that are dealt with at once: a vCPU may wait for its turn.
const PIECE_BATCH: u64 = 16;

/// How long a pushed frame is left to come as a whole before its bytes are taken as they come.
const WHOLE_FRAME_TIMEOUT: Duration = Duration::from_millis(2);

/// Before a frame that could not be installed is tried again, where no event makes room for it.
pub const INSTALL_RETRY_DELAY: Duration = Duration::from_millis(1);

/// The outcome of a step.
#[derive(Debug)]
pub enum Step {
    /// Nothing was there.
    Nothing,
    /// Something: there may be more.
    Progress,
    /// A frame cannot be installed now.
    Stopped(Stop),
    /// All that was lacking has been sent.
    Ended,
    /// The lane is of no more use.
    Broken(LaneFailure),
}

/// Why a lane is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum LaneFailure {
    /// Bytes that are no frame.
    #[error(transparent)]
    Frame(#[from] BadFrame),
    /// A frame of pages that are not in the layout.
    #[error(transparent)]
    Outside(#[from] OutsideLayout),
    /// The source closed the connection.
    #[error("the source closed the connection")]
    Closed,
    /// The connection failed.
    #[error(transparent)]
    Connection(io::Error),
    /// The source cannot continue, and says why.
    #[error("the source says: {0}")]
    Source(String),
    /// A frame that has come as a whole was not received as a whole.
    #[error("a frame cannot be received where its pages belong")]
    Direct,
}

impl LaneFailure {
    /// Whether the source does not keep to the contract: then it cannot be trusted further.
    pub fn is_nonsense(&self) -> bool {
        matches!(self, Self::Frame(_) | Self::Outside(_))
    }
}

/// Where the frame stands that is being taken.
#[derive(Debug)]
enum FrameState {
    /// Its header comes.
    None,
    /// So many bytes are received, then so many pages dealt with.
    Data(PageRun, usize, u64),
    Zero(PageRun),
    Poison(PageRun, PoisonInfo),
    /// The text says why the source cannot continue: so long, and so many bytes of it are there.
    Reason(usize, usize),
}

/// The receiving end of a lane.
#[derive(Debug)]
pub struct LaneReceiver {
    stream: TcpStream,
    lane: LaneKind,
    header: [u8; HEADER_BYTES],
    /// Bytes of the next header that are there.
    have: usize,
    /// Bytes behind it that came with it, at the start of `contents`: at most a page, not looked at yet.
    ahead: usize,
    frame: FrameState,
    /// The contents of a frame.
    contents: Vec<u8>,
    /// Where a frame is received.
    iovecs: IoVecs,
    /// When a frame to be received in place was first found to be there in part.
    part_since: Option<Instant>,
    /// The last frame with bytes was received where its pages belong.
    in_place: bool,
}

impl AsFd for LaneReceiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl LaneReceiver {
    /// Of a connected lane.
    pub fn new(stream: TcpStream, lane: LaneKind) -> Self {
        let contents = vec![0; (MAX_FRAME_PAGES * PAGE_SIZE) as usize];
        Self {
            stream,
            lane,
            header: [0; HEADER_BYTES],
            have: 0,
            ahead: 0,
            frame: FrameState::None,
            contents,
            iovecs: IoVecs::default(),
            part_since: None,
            in_place: false,
        }
    }

    /// The connection, to send on.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Whether the last frame with bytes was received where its pages belong.
    pub fn is_in_place(&self) -> bool {
        self.in_place
    }

    /// Whether the next step need not wait for the lane, as far as is known without asking it.
    pub fn has_more(&self) -> bool {
        self.ahead > 0 || !matches!(self.frame, FrameState::None)
    }

    /// Receives as much as is there, at most a frame.
    pub fn step(&mut self, shared: &SharedPages) -> Step {
        match std::mem::replace(&mut self.frame, FrameState::None) {
            FrameState::None => self.take_header(shared),
            FrameState::Data(pages, received, handled) => self.take_data(shared, pages, received, handled),
            FrameState::Zero(pages) => {
                let part = PageRun { count: pages.count.min(MAX_PAGES_WITHOUT_DATA), ..pages };
                let stop = shared.lock().zeros(part, self.lane);
                self.after_pages_without_data(stop, pages, part.count, FrameState::Zero)
            }
            FrameState::Poison(pages, note) => {
                let part = PageRun { count: pages.count.min(MAX_PAGES_WITHOUT_DATA), ..pages };
                let stop = shared.poison(part, note);
                self.after_pages_without_data(stop, pages, part.count, |pages| FrameState::Poison(pages, note))
            }
            FrameState::Reason(length, have) => self.take_reason(length, have),
        }
    }

    fn take_header(&mut self, shared: &SharedPages) -> Step {
        if self.have < HEADER_BYTES {
            if let Err(step) = self.receive_header() {
                return step;
            }
            if self.have < HEADER_BYTES {
                return Step::Progress;
            }
        }
        self.have = 0;
        let header = match FrameHeader::decode(&self.header) {
            Ok(header) => header,
            Err(error) => return Step::Broken(error.into()),
        };
        let pages = PageRun { region: header.region, page: header.page, count: header.count.into() };
        self.frame = match header.kind {
            FrameKind::Data => FrameState::Data(pages, 0, 0),
            FrameKind::Zero => FrameState::Zero(pages),
            FrameKind::Poison(note) => FrameState::Poison(pages, note),
            FrameKind::Failed => {
                let length = header.contents_bytes();
                FrameState::Reason(length, std::mem::take(&mut self.ahead).min(length))
            }
            FrameKind::End => return Step::Ended,
        };
        if !matches!(header.kind, FrameKind::Failed)
            && let Err(outside) = shared.lock().check(pages)
        {
            return Step::Broken(outside.into());
        }
        self.step(shared)
    }

    fn take_data(&mut self, shared: &SharedPages, pages: PageRun, received: usize, mut handled: u64) -> Step {
        if received == 0
            && self.lane == LaneKind::Bulk
            && shared.lock().can_receive_directly(pages)
            && let Some(step) = self.receive_in_place(shared, pages)
        {
            return step;
        }
        let bytes = (pages.count * PAGE_SIZE) as usize;
        let mut received = received + std::mem::take(&mut self.ahead);
        if received < bytes {
            let mut places = self.iovecs.start();
            places.push(&mut self.contents[received..bytes]);
            places.push(&mut self.header[self.have..]);
            match receive(&self.stream, places) {
                Ok(n) => {
                    self.have = n.saturating_sub(bytes - received);
                    received += n - self.have;
                }
                Err(step) => {
                    self.frame = FrameState::Data(pages, received, handled);
                    return step;
                }
            }
            if received < bytes {
                self.frame = FrameState::Data(pages, received, handled);
                return Step::Progress;
            }
        }
        self.in_place = false;
        while handled < pages.count {
            if let Some(stop) = self.install(shared, pages, &mut handled) {
                return self.stopped(stop, pages, handled);
            }
        }
        Step::Progress
    }

    /// Some of the pages in the buffer, at least one: from the `handled`-th on.
    fn install(&self, shared: &SharedPages, pages: PageRun, handled: &mut u64) -> Option<Stop> {
        let rest = pages.after(*handled);
        let bytes = &self.contents[(*handled * PAGE_SIZE) as usize..(pages.count * PAGE_SIZE) as usize];
        let _on_its_way = shared.install_guard();
        let claim = shared.lock().claim(rest, self.lane);
        if let Some(mut claim) = claim {
            let stop = shared.install(&mut claim, bytes);
            *handled += claim.handled();
            return stop;
        }
        let few = PageRun { count: rest.count.min(PIECE_BATCH), ..rest };
        let mut done = 0;
        let stop = shared.lock().pieces(few, self.lane, bytes, &mut done);
        *handled += done;
        stop
    }

    /// Receives a frame where its pages belong, and installs it. `None`: it is to be received into the buffer.
    fn receive_in_place(&mut self, shared: &SharedPages, pages: PageRun) -> Option<Step> {
        let bytes = (pages.count * PAGE_SIZE) as usize;
        if self.queued() < bytes {
            if self.part_since.get_or_insert_with(Instant::now).elapsed() < WHOLE_FRAME_TIMEOUT {
                self.frame = FrameState::Data(pages, 0, 0);
                return Some(Step::Nothing);
            }
            self.part_since = None;
            return None;
        }
        self.part_since = None;
        let _on_its_way = shared.install_guard();
        let mut claim = shared.lock().claim_in_place(pages, self.lane)?;
        let mut places = self.iovecs.start();
        if !claim.add_places(&mut self.contents, &mut places) {
            shared.lock().finish_claim(&claim);
            return None;
        }
        places.push(&mut self.header[self.have..]);
        let received = match receive(&self.stream, places) {
            Ok(n) if n >= bytes => {
                self.have = n - bytes;
                self.in_place = true;
                return Some(shared.install(&mut claim, &[]).map_or(Step::Progress, Step::Stopped));
            }
            // All of it was there: behind the received bytes lies a page that cannot be written.
            Ok(n) => n,
            Err(Step::Broken(LaneFailure::Connection(error))) if error.raw_os_error() == Some(libc::EFAULT) => 0,
            Err(step) => {
                shared.lock().finish_claim(&claim);
                self.frame = FrameState::Data(pages, 0, 0);
                return Some(step);
            }
        };
        let replaced = claim.withdraw(received, &mut self.contents);
        shared.lock().finish_claim(&claim);
        if replaced.is_none() || (received, replaced) == (0, Some(0)) {
            return Some(Step::Broken(LaneFailure::Direct));
        }
        self.frame = FrameState::Data(pages, received, 0);
        Some(Step::Progress)
    }

    /// Keeps a frame in the buffer, unless the VMM gave its range up or something is wrong: then its pages stay absent and the
    /// lane continues.
    fn stopped(&mut self, stop: Stop, pages: PageRun, handled: u64) -> Step {
        if !matches!(stop, Stop::NotRegistered | Stop::Refused(_)) {
            self.frame = FrameState::Data(pages, (pages.count * PAGE_SIZE) as usize, handled);
        }
        Step::Stopped(stop)
    }

    /// Bytes that have come and were not received (tcp(7), `SIOCINQ`); 0 where that is not known.
    fn queued(&self) -> usize {
        ioctl_fionread(&self.stream).map_or(0, |bytes| bytes as usize)
    }

    /// Receives the next header, as far as it is there. A frame of the urgent lane is a page, received with its header.
    fn receive_header(&mut self) -> Result<(), Step> {
        let kept = self.ahead.min(HEADER_BYTES - self.have);
        self.header[self.have..][..kept].copy_from_slice(&self.contents[..kept]);
        self.contents.copy_within(kept..self.ahead, 0);
        self.ahead -= kept;
        self.have += kept;
        let missing = HEADER_BYTES - self.have;
        if missing > 0 {
            let mut places = self.iovecs.start();
            places.push(&mut self.header[self.have..]);
            if self.lane == LaneKind::Urgent {
                places.push(&mut self.contents[..PAGE_SIZE as usize]);
            }
            let received = receive(&self.stream, places)?;
            self.have += received.min(missing);
            self.ahead = received.saturating_sub(missing);
        }
        Ok(())
    }

    fn after_pages_without_data(
        &mut self,
        stop: Option<Stop>,
        pages: PageRun,
        done: u64,
        rest: impl FnOnce(PageRun) -> FrameState,
    ) -> Step {
        if let Some(stop) = stop {
            self.frame = rest(pages);
            return Step::Stopped(stop);
        }
        if done < pages.count {
            self.frame = rest(pages.after(done));
        }
        Step::Progress
    }

    fn take_reason(&mut self, length: usize, have: usize) -> Step {
        if have < length {
            let mut places = self.iovecs.start();
            places.push(&mut self.contents[have..length]);
            return match receive(&self.stream, places) {
                Ok(n) => {
                    self.frame = FrameState::Reason(length, have + n);
                    Step::Progress
                }
                Err(step) => {
                    self.frame = FrameState::Reason(length, have);
                    step
                }
            };
        }
        Step::Broken(LaneFailure::Source(String::from_utf8_lossy(&self.contents[..length]).into_owned()))
    }
}

/// Receives once from a lane, without waiting.
fn receive(stream: &TcpStream, places: ReceivePlaces<'_>) -> Result<usize, Step> {
    match places.receive(stream) {
        Ok(0) => Err(Step::Broken(LaneFailure::Closed)),
        Ok(bytes) => Ok(bytes),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            Err(Step::Nothing)
        }
        Err(error) => Err(Step::Broken(LaneFailure::Connection(error))),
    }
}
