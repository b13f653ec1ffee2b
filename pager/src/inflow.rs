//! What comes on a lane, taken in small steps so that nothing else waits long: a frame's header, its bytes to where they
//! belong, its installation.
//!
//! The bytes of a frame and the header of the next are received by one call. A frame that cannot be installed now (events
//! to be read first, no memory) stays, and nothing more is read from its lane meanwhile.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};

use crate::arriving::{Arriving, Lane, Pages, PoisonNote};
use crate::lane::frame::{HEADER_BYTES, Header, Kind};
use crate::lane::{MOST_PAGES, PAGE};
use crate::resolver::Resolver;
use crate::userfaultfd::Stop;

/// Pages that are dealt with in one step where they bring no bytes.
const MOST_TOLD: u64 = 4096;

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
    /// Data cannot begin yet: to be tried again.
    Waiting(Pages),
    Data(Arriving),
    Zero(Pages),
    Poison(Pages, PoisonNote),
    /// The text says why the source cannot go on: so many bytes of it are there.
    Reason(Vec<u8>, usize),
}

/// The receiving end of a lane.
#[derive(Debug)]
pub struct Inflow {
    stream: TcpStream,
    lane: Lane,
    header: [u8; HEADER_BYTES],
    /// Bytes of the next header that are there.
    have: usize,
    frame: Frame,
    /// For bytes that are installed by COPY, or not wanted.
    scratch: Vec<u8>,
    vectors: Vec<libc::iovec>,
}

impl AsRawFd for Inflow {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl Inflow {
    /// Of a connected lane.
    pub fn new(stream: TcpStream, lane: Lane) -> Self {
        let scratch = vec![0; (MOST_PAGES * PAGE) as usize];
        Self { stream, lane, header: [0; HEADER_BYTES], have: 0, frame: Frame::None, scratch, vectors: Vec::new() }
    }

    /// The connection, to send on.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Takes what is there, at most a frame.
    pub fn step(&mut self, resolver: &mut Resolver) -> Step {
        match std::mem::replace(&mut self.frame, Frame::None) {
            Frame::None => self.take_header(resolver),
            Frame::Waiting(pages) => self.begin(resolver, pages),
            Frame::Data(arriving) => self.take_data(resolver, arriving),
            Frame::Zero(pages) => {
                let part = Pages { count: pages.count.min(MOST_TOLD), ..pages };
                let outcome = resolver.zeros(part, self.lane);
                self.told(outcome, pages, part.count, Frame::Zero)
            }
            Frame::Poison(pages, note) => {
                let part = Pages { count: pages.count.min(MOST_TOLD), ..pages };
                let outcome = resolver.poison(part, note);
                self.told(outcome, pages, part.count, |pages| Frame::Poison(pages, note))
            }
            Frame::Reason(text, have) => self.take_reason(text, have),
        }
    }

    /// The lane is given up: nothing of a frame that has come in part stays claimed.
    pub fn close(&mut self, resolver: &mut Resolver) {
        if let Frame::Data(arriving) = std::mem::replace(&mut self.frame, Frame::None) {
            resolver.abandon(&arriving);
        }
    }

    fn take_header(&mut self, resolver: &mut Resolver) -> Step {
        if self.have < HEADER_BYTES {
            let into = &mut self.header[self.have..];
            self.vectors.clear();
            self.vectors.push(libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() });
            match self.receive() {
                Ok(n) => self.have += n,
                Err(step) => return step,
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
        match header.kind {
            Kind::Data => return self.begin(resolver, pages),
            Kind::Zero => self.frame = Frame::Zero(pages),
            Kind::Poison(note) => self.frame = Frame::Poison(pages, note),
            Kind::Failed => self.frame = Frame::Reason(vec![0; header.contents_bytes()], 0),
            Kind::End => return Step::Ended,
        }
        self.step(resolver)
    }

    fn begin(&mut self, resolver: &mut Resolver, pages: Pages) -> Step {
        match resolver.begin(pages, self.lane) {
            Err(reason) => Step::Broken { reason, nonsense: true },
            Ok(Err(stop)) => {
                self.frame = Frame::Waiting(pages);
                Step::Stopped(stop)
            }
            Ok(Ok(arriving)) => self.take_data(resolver, arriving),
        }
    }

    fn take_data(&mut self, resolver: &mut Resolver, mut arriving: Arriving) -> Step {
        if arriving.received < arriving.bytes() {
            self.aim(resolver, &arriving);
            match self.receive() {
                Ok(n) => {
                    let left = arriving.bytes() - arriving.received;
                    arriving.received += n.min(left);
                    self.have = n.saturating_sub(left);
                }
                Err(step) => {
                    self.frame = Frame::Data(arriving);
                    return step;
                }
            }
            if arriving.received < arriving.bytes() {
                self.frame = Frame::Data(arriving);
                return Step::Some;
            }
        }
        match resolver.finish(&mut arriving, &self.scratch) {
            None => Step::Some,
            // The VMM gave the range up, or something is wrong: these pages are absent again, the lane goes on.
            Some(stop @ (Stop::NotRegistered | Stop::Refused(_))) => {
                resolver.abandon(&arriving);
                Step::Stopped(stop)
            }
            Some(stop) => {
                self.frame = Frame::Data(arriving);
                Step::Stopped(stop)
            }
        }
    }

    /// Points the vectors at where the rest of a frame goes, and behind it at the next header.
    fn aim(&mut self, resolver: &mut Resolver, arriving: &Arriving) {
        self.vectors.clear();
        let page = PAGE as usize;
        let mut at = arriving.received;
        while at < arriving.bytes() {
            let (index, offset) = (at / page, at % page);
            let target = resolver.target(arriving, index as u64);
            let base = target.unwrap_or_else(|| self.scratch[index * page..].as_mut_ptr()).wrapping_add(offset);
            match self.vectors.last_mut() {
                Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == base => {
                    last.iov_len += page - offset
                }
                _ => self.vectors.push(libc::iovec { iov_base: base.cast(), iov_len: page - offset }),
            }
            at += page - offset;
        }
        self.vectors.push(libc::iovec { iov_base: self.header.as_mut_ptr().cast(), iov_len: HEADER_BYTES });
    }

    /// One call; never waits.
    fn receive(&mut self) -> Result<usize, Step> {
        // SAFETY: a zeroed msghdr is valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.vectors.as_mut_ptr();
        message.msg_iovlen = self.vectors.len();
        // SAFETY: each vector is a part of the header, of the scratch buffer, of a huge page's buffer, or of a mapping of the
        // VMM's file that only the kernel touches; nothing of them has changed since they were taken.
        let n = unsafe { libc::recvmsg(self.stream.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        match usize::try_from(n) {
            Ok(0) => Err(Step::Broken { reason: "the source closed the connection".into(), nonsense: false }),
            Ok(n) => Ok(n),
            Err(_) => Err(match io::Error::last_os_error() {
                error if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    Step::Nothing
                }
                // The file behind the VMM's memory cannot have the page.
                error if error.raw_os_error() == Some(libc::EFAULT) => Step::Stopped(Stop::NoMemory),
                error => Step::Broken { reason: error.to_string(), nonsense: false },
            }),
        }
    }

    fn told(
        &mut self,
        outcome: Result<Option<Stop>, String>,
        pages: Pages,
        done: u64,
        rest: impl FnOnce(Pages) -> Frame,
    ) -> Step {
        match outcome {
            Err(reason) => return Step::Broken { reason, nonsense: true },
            Ok(Some(stop)) => {
                self.frame = rest(pages);
                return Step::Stopped(stop);
            }
            Ok(None) if done < pages.count => {
                self.frame = rest(Pages { page: pages.page + done, count: pages.count - done, ..pages });
            }
            Ok(None) => {}
        }
        Step::Some
    }

    fn take_reason(&mut self, mut text: Vec<u8>, have: usize) -> Step {
        if have < text.len() {
            let into = &mut text[have..];
            self.vectors.clear();
            self.vectors.push(libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() });
            match self.receive() {
                Ok(n) => self.frame = Frame::Reason(text, have + n),
                Err(Step::Nothing) => {
                    self.frame = Frame::Reason(text, have);
                    return Step::Nothing;
                }
                Err(step) => return step,
            }
            return Step::Some;
        }
        Step::Broken { reason: format!("the source says: {}", String::from_utf8_lossy(&text)), nonsense: false }
    }
}
