//! Sends pages on a lane as frames: from where they lie, or through one buffer that is used again for every frame, so that
//! it stays in the processor's cache.

use std::io::{self, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::queue_limit::{Look, QueueLimit};
use crate::lane::MAX_FRAME_PAGES;
use crate::lane::frame::{FrameHeader, FrameKind};
use crate::layout::PAGE_SIZE;
use crate::layout::page_run::PageRun;
use crate::source::memory::{Found, GuestMemory, PageBytes, Runs};
use crate::source::{SourceError, SourceState};
use crate::sys::tcp::{self, TcpInfo};

/// Why a lane cannot go on.
#[derive(Debug, thiserror::Error)]
pub(in crate::source) enum LaneError {
    /// The destination is told.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Nobody can be told.
    #[error("connection: {0}")]
    Connection(#[from] io::Error),
}

/// The sending end of a lane.
#[derive(Debug)]
pub(in crate::source) struct LaneSender {
    stream: TcpStream,
    buffer: Vec<u8>,
    runs: Runs,
    bytes_sent: u64,
    /// Of a lane that gives way to others.
    queue_limit: Option<QueueLimit>,
}

/// Bytes of a call at least, where the network is the limit.
const MIN_PIECE: u64 = 16 << 10;
/// A call takes so many times as long as the pace allows for, at most: 10 ms.
const PIECES_A_SECOND: u64 = 100;

impl LaneSender {
    /// Of a connected lane.
    pub fn new(stream: TcpStream) -> Self {
        let buffer = vec![0; (MAX_FRAME_PAGES * PAGE_SIZE) as usize];
        Self { stream, buffer, runs: Runs::default(), bytes_sent: 0, queue_limit: None }
    }

    /// The same, which keeps its queue in the network short.
    pub fn with_short_queue(self) -> Self {
        Self { queue_limit: Some(QueueLimit::new(Instant::now())), ..self }
    }

    /// Bytes given to the connection, headers among them.
    pub fn bytes_sent(&self) -> u64 {
        self.bytes_sent
    }

    /// Sends pages that lie in the layout, each exactly once, known poison first.
    pub fn send(&mut self, state: &SourceState, asked: PageRun) -> Result<(), LaneError> {
        let (mut page, end) = (asked.page, asked.page + asked.count);
        while page < end {
            // Looked at for every frame: when the VM may run again, no page of it is sent any more.
            let memory = state.frozen_memory()?;
            let run = PageRun { page, count: (end - page).min(MAX_FRAME_PAGES), ..asked };
            let known = state.known_poison(run);
            let good = PageRun { count: known.map_or(run.count, |(bad, _)| bad - page), ..run };
            if good.count > 0 {
                page += self.send_good(state, &memory, good)?;
            }
            if let Some((bad, note)) = known.filter(|(bad, _)| *bad == page) {
                self.send_without_data(state, PageRun { page: bad, count: 1, ..run }, FrameKind::Poison(note))?;
                page = bad + 1;
            }
        }
        Ok(())
    }

    /// Sends pages that nothing bad is known of, at least the first, and returns how many; what turns out poisoned is known
    /// from now on.
    fn send_good(&mut self, state: &SourceState, memory: &GuestMemory, run: PageRun) -> Result<u64, LaneError> {
        let PageRun { region, page, count } = run;
        let place = memory.read(region, page, count, &mut self.buffer, &mut self.runs).map_err(SourceError::from)?;
        let bytes = match place {
            PageBytes::InBuffer => self.buffer.as_ptr(),
            PageBytes::Mapped(at) => at,
        };
        let runs = std::mem::take(&mut self.runs);
        let mut at = page;
        for found in runs.iter() {
            let part = PageRun { region, page: at, count: found.count() };
            match found {
                Found::Data(_) => {
                    let contents = bytes.wrapping_add(((at - page) * PAGE_SIZE) as usize);
                    state.note_data(part);
                    self.write(&header(part, FrameKind::Data), contents, (part.count * PAGE_SIZE) as usize)?;
                }
                Found::Zero(_) => self.send_without_data(state, part, FrameKind::Zero)?,
                Found::Poison(_) => {
                    let note = state.found_poison(part);
                    self.send_without_data(state, part, FrameKind::Poison(note))?;
                }
            }
            at += part.count;
        }
        self.runs = runs;
        Ok(at - page)
    }

    /// Pages that need no bytes.
    fn send_without_data(&mut self, state: &SourceState, run: PageRun, kind: FrameKind) -> Result<(), LaneError> {
        if kind == FrameKind::Zero {
            state.sent.mark(run);
        }
        state.pages_served.fetch_add(run.count, Ordering::Relaxed);
        let header = header(run, kind);
        self.stream.write_all(&header)?;
        self.bytes_sent += header.len() as u64;
        Ok(())
    }

    /// All that was lacking has been sent.
    pub fn end(&mut self) -> io::Result<()> {
        self.stream.write_all(&FrameHeader { kind: FrameKind::End, region: 0, page: 0, count: 0 }.encode())
    }

    /// Says why the lane ends.
    pub fn failed(&mut self, reason: &str) -> io::Result<()> {
        let text = &reason.as_bytes()[..reason.len().min(crate::lane::frame::MAX_REASON_BYTES as usize)];
        let header = FrameHeader { kind: FrameKind::Failed, region: 0, page: 0, count: text.len() as u32 };
        self.write(&header.encode(), text.as_ptr(), text.len())
    }

    /// Sends a header and the `length` bytes at `contents`, by one call where the socket has room. If the contents go bad
    /// meanwhile (`EFAULT`), the frame is never whole, so nothing of it is ever installed.
    fn write(&mut self, header: &[u8], contents: *const u8, length: usize) -> io::Result<()> {
        let (all, mut sent) = (header.len() + length, 0);
        while sent < all {
            let most = self.keep_queue_short();
            let of_header = sent.min(header.len());
            let of_contents = sent - of_header;
            let rest = |base: *const u8, done: usize, length: usize| libc::iovec {
                iov_base: base.wrapping_add(done).cast_mut().cast(),
                iov_len: (length - done).min(most),
            };
            let throttle = [rest(header.as_ptr(), of_header, header.len()), rest(contents, of_contents, length)];
            // SAFETY: two vectors, which the kernel only reads, and where it cannot it says so.
            let n = unsafe { libc::writev(self.stream.as_raw_fd(), throttle.as_ptr(), 2) };
            match usize::try_from(n) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    sent += n;
                    self.bytes_sent += n as u64;
                }
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    /// Looks how long the queue in the network is, where it is time for that; the most bytes for the next call.
    fn keep_queue_short(&mut self) -> usize {
        let now = Instant::now();
        let Some(limit) = &mut self.queue_limit else { return usize::MAX };
        if limit.is_due(now)
            && let Ok(Some(info)) = TcpInfo::of(&self.stream)
            && let Some(pace) = limit.look(now, Look::from(info))
        {
            tracing::debug!(?pace, ?info, "lane.paced");
            // Without it the queue is longer, and nothing is wrong.
            let _ = tcp::set_max_pacing_rate(&self.stream, pace);
        }
        limit.pace().map_or(usize::MAX, |pace| (pace / PIECES_A_SECOND).max(MIN_PIECE) as usize)
    }
}

impl SourceState {
    /// Noted before it is sent: who has a page finds it counted.
    fn note_data(&self, run: PageRun) {
        self.sent.mark(run);
        self.pages_served.fetch_add(run.count, Ordering::Relaxed);
        self.bytes_served.fetch_add(run.count * PAGE_SIZE, Ordering::Relaxed);
    }
}

fn header(run: PageRun, kind: FrameKind) -> [u8; crate::lane::frame::HEADER_BYTES] {
    // A frame is never longer than what one ask or one chunk names: far below 2^32 pages.
    FrameHeader { kind, region: run.region, page: run.page, count: run.count as u32 }.encode()
}
