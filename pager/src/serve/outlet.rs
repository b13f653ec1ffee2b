//! Sends pages on a lane as frames, through one buffer that is used again for every frame: it stays in the processor's
//! cache.

use std::io::{self, IoSlice, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;

use super::{Shared, SourceError};
use crate::arriving::Pages;
use crate::guest_memory::{Found, GuestMemory, Runs};
use crate::lane::frame::{Header, Kind};
use crate::lane::{MOST_PAGES, PAGE};

/// Why a lane cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    /// The destination is told.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Nobody can be told.
    #[error("connection: {0}")]
    Connection(#[from] io::Error),
}

/// The sending end of a lane.
#[derive(Debug)]
pub(super) struct Outlet {
    stream: TcpStream,
    buffer: Vec<u8>,
    runs: Runs,
}

impl Outlet {
    /// Of a connected lane.
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, buffer: vec![0; (MOST_PAGES * PAGE) as usize], runs: Runs::default() }
    }

    /// Sends pages that lie in the layout, each exactly once, known poison first.
    pub fn send(&mut self, shared: &Shared, asked: Pages) -> Result<(), Broken> {
        let (mut page, end) = (asked.page, asked.page + asked.count);
        while page < end {
            // Looked at for every frame: when the VM may run again, no page of it is sent any more.
            let memory = shared.frozen_memory()?;
            let run = Pages { page, count: (end - page).min(MOST_PAGES), ..asked };
            let known = shared.known_poison(run);
            let good = Pages { count: known.map_or(run.count, |(bad, _)| bad - page), ..run };
            if good.count > 0 {
                self.send_good(shared, &memory, good)?;
                page += good.count;
            }
            if let Some((bad, note)) = known {
                self.told(shared, Pages { page: bad, count: 1, ..run }, Kind::Poison(note))?;
                page = bad + 1;
            }
        }
        Ok(())
    }

    /// Sends pages that nothing bad is known of; what turns out poisoned is known from now on.
    fn send_good(&mut self, shared: &Shared, memory: &GuestMemory, run: Pages) -> Result<(), Broken> {
        let Pages { region, page, count } = run;
        memory.read(region, page, count, &mut self.buffer, &mut self.runs).map_err(SourceError::from)?;
        let runs = std::mem::take(&mut self.runs);
        let mut at = page;
        for found in runs.iter() {
            let part = Pages { region, page: at, count: found.count() };
            match found {
                Found::Data(_) => self.copy(shared, part, at - page)?,
                Found::Zero(_) => self.told(shared, part, Kind::Zero)?,
                Found::Poison(_) => {
                    let note = shared.found_poison(part);
                    self.told(shared, part, Kind::Poison(note))?;
                }
            }
            at += part.count;
        }
        self.runs = runs;
        Ok(())
    }

    /// The bytes are `offset` pages into the buffer.
    fn copy(&mut self, shared: &Shared, run: Pages, offset: u64) -> Result<(), Broken> {
        let bytes = &self.buffer[(offset * PAGE) as usize..((offset + run.count) * PAGE) as usize];
        shared.note_data(run);
        write_all(&mut self.stream, &header(run, Kind::Data), bytes)?;
        Ok(())
    }

    /// Pages that need no bytes.
    fn told(&mut self, shared: &Shared, run: Pages, kind: Kind) -> Result<(), Broken> {
        if kind == Kind::Zero {
            shared.note_sent(run);
        }
        shared.pages_served.fetch_add(run.count, Ordering::Relaxed);
        self.stream.write_all(&header(run, kind))?;
        Ok(())
    }

    /// All that was lacking has been sent.
    pub fn end(&mut self) -> io::Result<()> {
        self.stream.write_all(&Header { kind: Kind::End, region: 0, page: 0, count: 0 }.encode())
    }

    /// Says why the lane ends.
    pub fn failed(&mut self, reason: &str) -> io::Result<()> {
        let text = &reason.as_bytes()[..reason.len().min(crate::lane::frame::LONGEST_REASON as usize)];
        let header = Header { kind: Kind::Failed, region: 0, page: 0, count: text.len() as u32 };
        write_all(&mut self.stream, &header.encode(), text)
    }
}

impl Shared {
    /// Noted before it is sent: who has a page finds it counted.
    fn note_data(&self, run: Pages) {
        self.note_sent(run);
        self.pages_served.fetch_add(run.count, Ordering::Relaxed);
        self.bytes_served.fetch_add(run.count * PAGE, Ordering::Relaxed);
    }
}

fn header(run: Pages, kind: Kind) -> [u8; crate::lane::frame::HEADER_BYTES] {
    // A frame is never longer than what one ask or one chunk names: far below 2^32 pages.
    Header { kind, region: run.region, page: run.page, count: run.count as u32 }.encode()
}

/// Writes two slices, in one call where the socket has room.
fn write_all(stream: &mut TcpStream, first: &[u8], second: &[u8]) -> io::Result<()> {
    let mut slices = [IoSlice::new(first), IoSlice::new(second)];
    let mut rest = &mut slices[..];
    while !rest.is_empty() {
        match stream.write_vectored(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => IoSlice::advance_slices(&mut rest, n),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
