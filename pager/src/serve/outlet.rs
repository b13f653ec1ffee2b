//! Sends pages on a lane as frames: by reference where the memory is a file (`splice`), else through one buffer that is
//! used again for every frame.

use std::io::{self, IoSlice, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use super::{Shared, SourceError};
use crate::arriving::{Pages, PoisonNote};
use crate::guest_memory::{Found, GuestMemory, Pipe, Runs};
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
    /// `None`: pages are copied.
    pipe: Option<Pipe>,
}

impl Outlet {
    /// Copies pages: soonest where they are few.
    pub fn copying(stream: TcpStream) -> Self {
        Self { stream, buffer: vec![0; (MOST_PAGES * PAGE) as usize], runs: Runs::default(), pipe: None }
    }

    /// Sends pages by reference where that can be done: cheapest where they are many.
    pub fn splicing(stream: TcpStream) -> Self {
        Self { pipe: Pipe::new().ok(), ..Self::copying(stream) }
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
        let by_reference =
            self.pipe.is_some() && memory.survey(region, page, count, &mut self.runs).map_err(SourceError::from)?;
        if !by_reference {
            memory.read(region, page, count, &mut self.buffer, &mut self.runs).map_err(SourceError::from)?;
        }
        let runs = std::mem::take(&mut self.runs);
        let mut at = page;
        for found in runs.iter() {
            let part = Pages { region, page: at, count: found.count() };
            match found {
                Found::Data(_) if by_reference => self.splice(shared, memory, part)?,
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

    fn splice(&mut self, shared: &Shared, memory: &GuestMemory, run: Pages) -> Result<(), Broken> {
        let Some(pipe) = &self.pipe else { return Ok(()) };
        let (mut page, end) = (run.page, run.page + run.count);
        while page < end {
            let count = memory.splice(run.region, page, end - page, pipe).map_err(SourceError::from)?;
            let part = Pages { page, count: count.max(1), ..run };
            if count == 0 {
                let note: PoisonNote = shared.found_poison(part);
                self.stream.write_all(&header(part, Kind::Poison(note)))?;
                shared.pages_served.fetch_add(1, Ordering::Relaxed);
            } else {
                more(&self.stream, &header(part, Kind::Data))?;
                pipe.send(self.stream.as_raw_fd(), (count * PAGE) as usize)?;
                shared.note_data(part);
            }
            page += part.count;
        }
        Ok(())
    }

    /// The bytes are `offset` pages into the buffer.
    fn copy(&mut self, shared: &Shared, run: Pages, offset: u64) -> Result<(), Broken> {
        let bytes = &self.buffer[(offset * PAGE) as usize..((offset + run.count) * PAGE) as usize];
        write_all(&mut self.stream, &header(run, Kind::Data), bytes)?;
        shared.note_data(run);
        Ok(())
    }

    /// Pages that need no bytes.
    fn told(&mut self, shared: &Shared, run: Pages, kind: Kind) -> Result<(), Broken> {
        self.stream.write_all(&header(run, kind))?;
        if kind == Kind::Zero {
            shared.note_sent(run);
        }
        shared.pages_served.fetch_add(run.count, Ordering::Relaxed);
        Ok(())
    }

    /// All that was lacking has been sent.
    pub fn end(&mut self) -> io::Result<()> {
        self.stream.write_all(&Header { kind: Kind::End, region: 0, page: 0, count: 0 }.encode())
    }

    /// Says why the lane ends.
    pub fn failed(&mut self, reason: &str) -> io::Result<()> {
        let text = &reason.as_bytes()[..reason.floor_char_boundary(crate::lane::frame::LONGEST_REASON as usize)];
        let header = Header { kind: Kind::Failed, region: 0, page: 0, count: text.len() as u32 };
        write_all(&mut self.stream, &header.encode(), text)
    }
}

impl Shared {
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

/// Writes bytes that others follow at once.
fn more(stream: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    let mut sent = 0;
    while sent < bytes.len() {
        let rest = &bytes[sent..];
        let flags = libc::MSG_MORE | libc::MSG_NOSIGNAL;
        // SAFETY: the kernel reads at most `rest`.
        let n = unsafe { libc::send(stream.as_raw_fd(), rest.as_ptr().cast(), rest.len(), flags) };
        match usize::try_from(n) {
            Ok(n) => sent += n,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
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
