//! Reads pages of the guest and sends them as frames: from a mapping of the guest's memory, or through one buffer. Every frame
//! uses the same buffer, so the buffer stays in the CPU's cache.

use std::io;
use std::net::TcpStream;
use std::sync::atomic::Ordering;

use super::frame_writer::FrameWriter;
use crate::lane::MAX_FRAME_PAGES;
use crate::lane::frame::{FrameHeader, FrameKind};
use crate::layout::PAGE_SIZE;
use crate::layout::page_run::PageRun;
use crate::source::memory::{Found, GuestMemory, PageBytes, Runs};
use crate::source::{SourceError, SourceState};
use crate::sys::iovecs::SendBytes;

/// The reason that a lane ends.
#[derive(Debug, thiserror::Error)]
pub(in crate::source) enum LaneError {
    /// The destination gets the reason.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The destination cannot get the reason.
    #[error("connection: {0}")]
    Connection(#[from] io::Error),
}

/// The sending end of a lane.
#[derive(Debug)]
pub(in crate::source) struct LaneSender {
    writer: FrameWriter,
    buffer: Vec<u8>,
    runs: Runs,
}

impl LaneSender {
    /// Takes a connected urgent lane.
    pub fn urgent(stream: TcpStream) -> Self {
        Self::new(FrameWriter::new(stream, false))
    }

    /// Takes a connected bulk lane, and keeps its queue in the network short.
    pub fn bulk(stream: TcpStream) -> Self {
        Self::new(FrameWriter::new(stream, true))
    }

    fn new(writer: FrameWriter) -> Self {
        Self { writer, buffer: vec![0; (MAX_FRAME_PAGES * PAGE_SIZE) as usize], runs: Runs::default() }
    }

    /// Bytes that the connection took, headers included.
    pub fn bytes_sent(&self) -> u64 {
        self.writer.bytes_sent()
    }

    /// Sends pages of the layout, each exactly once. Poison that is known goes first.
    pub fn send(&mut self, state: &SourceState, asked: PageRun) -> Result<(), LaneError> {
        let (mut page, end) = (asked.page, asked.page + asked.count);
        while page < end {
            // Checked for every frame: no page may be sent once the VM can run again.
            let memory = state.frozen_memory()?;
            let run = PageRun { page, count: (end - page).min(MAX_FRAME_PAGES), ..asked };
            let known = state.known_poison(run);
            let good = PageRun { count: known.map_or(run.count, |(bad, _)| bad - page), ..run };
            if good.count > 0 {
                page += self.send_good(state, &memory, good)?;
            }
            if let Some((bad, info)) = known.filter(|(bad, _)| *bad == page) {
                let bad_page = PageRun { page: bad, count: 1, ..run };
                send_without_data(&mut self.writer, state, bad_page, FrameKind::Poison(info))?;
                page = bad + 1;
            }
        }
        Ok(())
    }

    /// Sends pages without known poison, at least the first, and returns how many. Records the poison that it finds.
    fn send_good(&mut self, state: &SourceState, memory: &GuestMemory, run: PageRun) -> Result<u64, LaneError> {
        let PageRun { region, page, count } = run;
        let place = memory.read(region, page, count, &mut self.buffer, &mut self.runs).map_err(SourceError::from)?;
        let mut sent = 0;
        for found in self.runs.iter() {
            let part = PageRun { region, page: page + sent, count: found.count() };
            match found {
                Found::Data(_) => {
                    state.count_data(part);
                    let contents = contents(place, &self.buffer, sent, part.count);
                    self.writer.write(&header(part, FrameKind::Data), contents)?;
                }
                Found::Zero(_) => send_without_data(&mut self.writer, state, part, FrameKind::Zero)?,
                Found::Poison(_) => {
                    let info = state.found_poison(part);
                    send_without_data(&mut self.writer, state, part, FrameKind::Poison(info))?;
                }
            }
            sent += part.count;
        }
        Ok(sent)
    }

    /// Tells the destination that every page it lacked has been sent.
    pub fn end(&mut self) -> io::Result<()> {
        self.writer.write_header(&FrameHeader { kind: FrameKind::End, region: 0, page: 0, count: 0 })
    }

    /// Tells the destination why the lane ends.
    pub fn failed(&mut self, reason: &str) -> io::Result<()> {
        self.writer.write_reason(reason)
    }
}

/// The bytes of `count` pages from the `first`-th on of those that were read.
fn contents<'a>(place: PageBytes<'a>, buffer: &'a [u8], first: u64, count: u64) -> SendBytes<'a> {
    match place {
        PageBytes::InBuffer => SendBytes::of(&buffer[(first * PAGE_SIZE) as usize..][..(count * PAGE_SIZE) as usize]),
        PageBytes::Mapped(pages) => SendBytes::of_pages(pages.part(first, count)),
    }
}

/// Sends the frame of pages that need no bytes.
fn send_without_data(writer: &mut FrameWriter, state: &SourceState, run: PageRun, kind: FrameKind) -> io::Result<()> {
    if kind == FrameKind::Zero {
        state.sent.mark(run);
    }
    state.pages_served.fetch_add(run.count, Ordering::Relaxed);
    writer.write_header(&header(run, kind))
}

impl SourceState {
    /// Counts pages before they are sent, so that a page which has arrived is always counted.
    fn count_data(&self, run: PageRun) {
        self.sent.mark(run);
        self.pages_served.fetch_add(run.count, Ordering::Relaxed);
        self.bytes_served.fetch_add(run.count * PAGE_SIZE, Ordering::Relaxed);
    }
}

/// A run is at most [`MAX_FRAME_PAGES`] long.
fn header(run: PageRun, kind: FrameKind) -> FrameHeader {
    FrameHeader { kind, region: run.region, page: run.page, count: run.count as u32 }
}
