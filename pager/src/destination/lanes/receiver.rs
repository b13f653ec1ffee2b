//! What comes on a lane, taken in small steps: a frame's header, its bytes, its installation. None of them waits for the lane.
//!
//! The bytes of a frame and the header of the next are received by one call: pushed ones in place, where that can be done and
//! all of the frame has come; otherwise into a buffer, always the same, which stays in the processor's cache, an answer on the
//! urgent lane with its own header as well. In the buffer are also pages of a frame that are not wanted, and a frame that cannot be
//! installed now (events to be read first, no memory): nothing more is read from its lane meanwhile. What was received in
//! place and cannot be mapped now is when it is touched. Nothing of a frame is claimed before all of it is here: a
//! lane that breaks in the middle leaves nothing behind.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use crate::destination::memory::receive_mapping::Places;
use crate::destination::pages::shared_pages::Shared;
use crate::lane::frame::{HEADER_BYTES, Header, Kind};
use crate::lane::{MOST_PAGES, PAGE};
use crate::layout::page_run::{Lane, Pages, PoisonNote};
use crate::sys::userfaultfd::Stop;

/// Pages that are dealt with in one step where they bring no bytes.
const MOST_TOLD: u64 = 4096;

/// Pieces of huge pages that are dealt with at once: a vCPU may wait for its turn.
const FEW: u64 = 16;

/// How long a pushed frame is left to come as a whole before its bytes are taken as they come.
const WHOLE: Duration = Duration::from_millis(2);

/// Before a frame that could not be installed is tried again, where no event makes room for it.
pub const STOPPED_PAUSE: Duration = Duration::from_millis(1);

/// What a step did.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing was there.
    Nothing,
    /// Something: there may be more.
    Some,
    /// A frame cannot be installed now.
    Stopped(Stop),
    /// All that was lacking has been sent.
    Ended,
    /// The lane is of no more use: the connection broke, or the source said why it cannot go on, or speaks nonsense
    /// (`nonsense`: then it cannot be trusted further).
    Broken {
        /// In words for people.
        reason: String,
        /// The source does not keep to the contract.
        nonsense: bool,
    },
}

/// Where the frame stands that is being taken.
#[derive(Debug)]
enum Frame {
    /// Its header comes.
    None,
    /// So many bytes are received, then so many pages dealt with.
    Data(Pages, usize, u64),
    Zero(Pages),
    Poison(Pages, PoisonNote),
    /// The text says why the source cannot go on: so long, and so many bytes of it are there.
    Reason(usize, usize),
}

/// The receiving end of a lane.
#[derive(Debug)]
pub struct Inflow {
    stream: TcpStream,
    lane: Lane,
    header: [u8; HEADER_BYTES],
    /// Bytes of the next header that are there.
    have: usize,
    /// Bytes behind it that came with it, at the start of `contents`: at most a page, not looked at yet.
    ahead: usize,
    frame: Frame,
    /// The contents of a frame.
    contents: Vec<u8>,
    /// Where a frame is received.
    places: Places,
    /// When a frame to be received in place was first found to be there in part.
    part_since: Option<Instant>,
    /// The last frame with bytes was received where its pages belong.
    in_place: bool,
}

impl AsRawFd for Inflow {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl Inflow {
    /// Of a connected lane.
    pub fn new(stream: TcpStream, lane: Lane) -> Self {
        let contents = vec![0; (MOST_PAGES * PAGE) as usize];
        Self {
            stream,
            lane,
            header: [0; HEADER_BYTES],
            have: 0,
            ahead: 0,
            frame: Frame::None,
            contents,
            places: Places::default(),
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
        self.ahead > 0 || !matches!(self.frame, Frame::None)
    }

    /// Takes what is there, at most a frame.
    pub fn step(&mut self, shared: &Shared) -> Step {
        match std::mem::replace(&mut self.frame, Frame::None) {
            Frame::None => self.take_header(shared),
            Frame::Data(pages, received, dealt) => self.take_data(shared, pages, received, dealt),
            Frame::Zero(pages) => {
                let part = Pages { count: pages.count.min(MOST_TOLD), ..pages };
                let stop = shared.lock().zeros(part, self.lane);
                self.told(stop, pages, part.count, Frame::Zero)
            }
            Frame::Poison(pages, note) => {
                let part = Pages { count: pages.count.min(MOST_TOLD), ..pages };
                let stop = shared.poison(part, note);
                self.told(stop, pages, part.count, |pages| Frame::Poison(pages, note))
            }
            Frame::Reason(length, have) => self.take_reason(length, have),
        }
    }

    fn take_header(&mut self, shared: &Shared) -> Step {
        if self.have < HEADER_BYTES {
            if let Err(step) = self.receive_header() {
                return step;
            }
            if self.have < HEADER_BYTES {
                return Step::Some;
            }
        }
        self.have = 0;
        let header = match Header::decode(&self.header) {
            Ok(header) => header,
            Err(error) => return Step::Broken { reason: error.to_string(), nonsense: true },
        };
        let pages = Pages { region: header.region, page: header.page, count: header.count.into() };
        self.frame = match header.kind {
            Kind::Data => Frame::Data(pages, 0, 0),
            Kind::Zero => Frame::Zero(pages),
            Kind::Poison(note) => Frame::Poison(pages, note),
            Kind::Failed => {
                let length = header.contents_bytes();
                Frame::Reason(length, std::mem::take(&mut self.ahead).min(length))
            }
            Kind::End => return Step::Ended,
        };
        if !matches!(header.kind, Kind::Failed)
            && let Err(reason) = shared.lock().check(pages)
        {
            return Step::Broken { reason, nonsense: true };
        }
        self.step(shared)
    }

    fn take_data(&mut self, shared: &Shared, pages: Pages, received: usize, mut dealt: u64) -> Step {
        if received == 0
            && self.lane == Lane::Push
            && shared.lock().lands(pages)
            && let Some(step) = self.take_in_place(shared, pages)
        {
            return step;
        }
        let bytes = (pages.count * PAGE) as usize;
        let mut received = received + std::mem::take(&mut self.ahead);
        if received < bytes {
            self.places.only(&mut self.contents[received..bytes]);
            match self.receive() {
                Ok(n) => {
                    self.have = n.saturating_sub(bytes - received);
                    received += n - self.have;
                }
                Err(step) => {
                    self.frame = Frame::Data(pages, received, dealt);
                    return step;
                }
            }
            if received < bytes {
                self.frame = Frame::Data(pages, received, dealt);
                return Step::Some;
            }
        }
        self.in_place = false;
        while dealt < pages.count {
            if let Some(stop) = self.install(shared, pages, &mut dealt) {
                return self.stopped(stop, pages, dealt);
            }
        }
        Step::Some
    }

    /// Some of the pages in the buffer, at least one: from the `dealt`-th on.
    fn install(&self, shared: &Shared, pages: Pages, dealt: &mut u64) -> Option<Stop> {
        let rest = pages.after(*dealt);
        let bytes = &self.contents[(*dealt * PAGE) as usize..(pages.count * PAGE) as usize];
        let _on_its_way = shared.on_its_way();
        let claim = shared.lock().claim(rest, self.lane);
        if let Some(mut claim) = claim {
            let stop = shared.install(&mut claim, bytes);
            *dealt += claim.dealt();
            return stop;
        }
        let few = Pages { count: rest.count.min(FEW), ..rest };
        let mut done = 0;
        let stop = shared.lock().pieces(few, self.lane, bytes, &mut done);
        *dealt += done;
        stop
    }

    /// Receives a frame where its pages belong, and installs it. `None`: it is to be received into the buffer.
    fn take_in_place(&mut self, shared: &Shared, pages: Pages) -> Option<Step> {
        let bytes = (pages.count * PAGE) as usize;
        if self.queued() < bytes {
            if self.part_since.get_or_insert_with(Instant::now).elapsed() < WHOLE {
                self.frame = Frame::Data(pages, 0, 0);
                return Some(Step::Nothing);
            }
            self.part_since = None;
            return None;
        }
        self.part_since = None;
        let _on_its_way = shared.on_its_way();
        let (mut claim, at) = shared.lock().claim_in_place(pages, self.lane)?;
        claim.places(at, &mut self.contents, &mut self.places);
        let received = self.receive();
        if let Ok(n) = received
            && n >= bytes
        {
            self.have = n - bytes;
            self.in_place = true;
            return Some(shared.install(&mut claim, &[]).map_or(Step::Some, Step::Stopped));
        }
        shared.lock().settle(&claim);
        // All of it was there.
        let reason = "a frame cannot be received where its pages belong".into();
        Some(received.err().filter(|step| *step != Step::Nothing).unwrap_or(Step::Broken { reason, nonsense: false }))
    }

    /// A frame in the buffer stays there, unless the VMM gave its range up or something is wrong: then its pages stay absent
    /// and the lane goes on.
    fn stopped(&mut self, stop: Stop, pages: Pages, dealt: u64) -> Step {
        if !matches!(stop, Stop::NotRegistered | Stop::Refused(_)) {
            self.frame = Frame::Data(pages, (pages.count * PAGE) as usize, dealt);
        }
        Step::Stopped(stop)
    }

    /// Bytes that have come and were not received (tcp(7), `SIOCINQ`); 0 where that is not known.
    fn queued(&self) -> usize {
        let mut bytes: libc::c_int = 0;
        // SAFETY: an int to write to.
        let told = unsafe { libc::ioctl(self.stream.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
        usize::try_from(bytes).ok().filter(|_| told == 0).unwrap_or(0)
    }

    /// The next header, as far as it is there; on a lane whose frames are of a page, with the page behind it.
    fn receive_header(&mut self) -> Result<(), Step> {
        let kept = self.ahead.min(HEADER_BYTES - self.have);
        self.header[self.have..][..kept].copy_from_slice(&self.contents[..kept]);
        self.contents.copy_within(kept..self.ahead, 0);
        self.ahead -= kept;
        self.have += kept;
        let missing = HEADER_BYTES - self.have;
        if missing > 0 {
            self.places.only(&mut self.header[self.have..]);
            if self.lane == Lane::Demand {
                self.places.then(self.contents.as_mut_ptr(), PAGE as usize);
            }
            let received = self.receive_all()?;
            self.have += received.min(missing);
            self.ahead = received.saturating_sub(missing);
        }
        Ok(())
    }

    /// To the places, and behind them the rest of the next header.
    fn receive(&mut self) -> Result<usize, Step> {
        let next = &mut self.header[self.have..];
        self.places.then(next.as_mut_ptr(), next.len());
        self.receive_all()
    }

    /// One call, which never waits, to the places.
    fn receive_all(&mut self) -> Result<usize, Step> {
        let vectors = self.places.vectors();
        // SAFETY: a zeroed msghdr is valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = vectors.as_mut_ptr();
        message.msg_iovlen = vectors.len();
        // SAFETY: the kernel writes at most to the places, which are ours to write, or says that it cannot.
        let n = unsafe { libc::recvmsg(self.stream.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        match usize::try_from(n) {
            Ok(0) => Err(Step::Broken { reason: "the source closed the connection".into(), nonsense: false }),
            Ok(n) => Ok(n),
            Err(_) => Err(match io::Error::last_os_error() {
                error if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    Step::Nothing
                }
                error => Step::Broken { reason: error.to_string(), nonsense: false },
            }),
        }
    }

    fn told(&mut self, stop: Option<Stop>, pages: Pages, done: u64, rest: impl FnOnce(Pages) -> Frame) -> Step {
        if let Some(stop) = stop {
            self.frame = rest(pages);
            return Step::Stopped(stop);
        }
        if done < pages.count {
            self.frame = rest(pages.after(done));
        }
        Step::Some
    }

    fn take_reason(&mut self, length: usize, have: usize) -> Step {
        if have < length {
            self.places.only(&mut self.contents[have..length]);
            return match self.receive() {
                Ok(n) => {
                    self.frame = Frame::Reason(length, (have + n).min(length));
                    Step::Some
                }
                Err(step) => {
                    self.frame = Frame::Reason(length, have);
                    step
                }
            };
        }
        let text = String::from_utf8_lossy(&self.contents[..length]);
        Step::Broken { reason: format!("the source says: {text}"), nonsense: false }
    }
}
