//! The bound: a guest is served without a request, a decision or a record.
//!
//! ```text
//!  vCPU ──▶ kernel ──▶ handler: read(uffd), a copy of the page that is here already, COPY or CONTINUE
//!                      receiver ◀────────── all pages, in order ────────── source: one write after the other
//! ```
//! The guest runs here with absent memory, but this process has a copy of all contents: the answer to a fault costs no
//! network. A second process sends the memory once more over TCP, into preallocated memory; a present page is dropped.
//! The first claim of a page wins; a byte a page records it. Every move by userfaultfd and TCP has to do at least this.

use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmferry_pager::internals::{cpu_time as clock, priority};
use vmferry_refvm::guest::report::Report;
use vmferry_refvm::kvm;
use vmferry_refvm::layout::{Backing, split};
use vmferry_refvm::machine::{GuestConfig, Machine, Workload};
use vmferry_refvm::memory::GuestMemory;
use vmferry_refvm::report_reader;

use crate::other::Other;
use crate::touch::{PAGE, say};
use crate::uffd::{Installer, answer, next_fault, watch};

/// Pages that are received, and put in place, at a time.
const CHUNK: usize = 64;
/// Bytes of as many, and that are sent at a time.
const CHUNK_BYTES: usize = CHUNK * PAGE as usize;
/// Between two looks at a guest that goes through its memory for the first time.
const LOOK: Duration = Duration::from_millis(50);
/// Touches after which a guest that pauses counts as warm.
const PACED_TOUCHES: u64 = 1000;
/// Between the last page and the reading of the report: for touches under way to end.
const AFTER: Duration = Duration::from_millis(50);

/// The moved guest.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Moved {
    /// Guest memory, bytes.
    pub memory: u64,
    /// The backing.
    pub backing: Backing,
    /// The guest.
    pub config: GuestConfig,
}

/// The figures of one round.
#[derive(Debug, Serialize)]
pub struct Served {
    /// vCPUs told to run to last page.
    seconds: f64,
    /// Bytes that came in that time.
    bytes: u64,
    /// Of handler, receiver and sender.
    machinery_cpu_s: f64,
    /// Of all other threads of the destination: its vCPUs.
    vcpu_cpu_s: f64,
    /// The guest's report.
    report: Report,
}

impl Moved {
    fn machine(&self) -> Result<(GuestMemory, Box<dyn Machine>), Box<dyn std::error::Error>> {
        let memory = GuestMemory::new(&split(self.memory, 1, self.backing)?)?;
        // No machine check can come, so no channel is kept.
        let machine = kvm::make(memory.ram(), self.config, channel().0)?;
        Ok((memory, machine))
    }

    /// As `shape.is_warm` of the Python part.
    fn is_warm(&self, report: &Report) -> bool {
        if self.config.workload == Workload::Paced { report.touches >= PACED_TOUCHES } else { report.passes >= 1 }
    }
}

/// The other process. A guest goes through its memory, and stops. Then its state and all of its memory go over the
/// connection. When a byte comes back, the memory goes once more, and then the CPU time of that in nanoseconds.
///
/// # Errors
/// No KVM, no memory, or of the network.
pub fn source(moved: &Moved) -> Result<(), Box<dyn std::error::Error>> {
    let (memory, mut machine) = moved.machine()?;
    machine.boot()?;
    machine.run()?;
    let mapped = &memory.mapped()[0];
    while !moved.is_warm(&report_reader::read_newest(mapped)?) {
        thread::sleep(LOOK);
    }
    machine.stop()?;
    let state = machine.save()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    say(listener.local_addr()?.port())?;
    let (mut stream, _) = listener.accept()?;
    stream.write_all(&(state.len() as u64).to_le_bytes())?;
    stream.write_all(&state)?;
    // SAFETY: the whole mapping, which `memory` keeps; the guest is stopped.
    let contents = unsafe { std::slice::from_raw_parts(mapped.hva as *const u8, mapped.size as usize) };
    stream.write_all(contents)?;
    stream.read_exact(&mut [0])?;
    priority::batch();
    let before = clock::thread_time();
    for piece in contents.chunks(CHUNK_BYTES) {
        stream.write_all(piece)?;
        priority::yield_cpu();
    }
    let spent = clock::thread_time() - before;
    stream.write_all(&(spent.as_nanos() as u64).to_le_bytes())?;
    Ok(())
}

/// The destination's memory. The first claim of a page installs it.
#[derive(Debug)]
struct Destination {
    hva: u64,
    installer: Installer,
    claimed: Vec<AtomicBool>,
    /// All contents, in order.
    mirror: Vec<u8>,
    /// Processor's time of the handler, ns.
    handler_ns: AtomicU64,
}

impl Destination {
    fn claim(&self, page: usize) -> bool {
        !self.claimed[page].swap(true, Ordering::AcqRel)
    }

    fn address(&self, page: usize) -> u64 {
        self.hva + page as u64 * PAGE
    }

    /// Answers faults out of the mirror.
    fn handle(&self, uffd: RawFd) -> io::Result<Infallible> {
        // As the page path of a pager, as far as it may.
        let _ = priority::realtime() || priority::favoured();
        loop {
            let page = ((next_fault(uffd)? - self.hva) / PAGE) as usize;
            if self.claim(page) {
                let from = page * PAGE as usize;
                self.installer.put(self.address(page), &self.mirror[from..from + PAGE as usize])?;
            }
            self.handler_ns.store(clock::thread_time().as_nanos() as u64, Ordering::Relaxed);
        }
    }

    /// Receives all pages, at most so many bytes a second unless that is 0.
    fn receive(&self, stream: &mut TcpStream, bytes_per_s: u64) -> io::Result<()> {
        let begun = Instant::now();
        let mut buffer = vec![0; CHUNK_BYTES];
        for first in (0..self.claimed.len()).step_by(CHUNK) {
            let mine: Vec<bool> = (first..first + CHUNK).map(|page| self.claim(page)).collect();
            let at = self.address(first);
            if mine.iter().all(|mine| *mine) {
                let room = self.installer.room(at, &mut buffer);
                stream.read_exact(room)?;
                self.installer.install(at, room, true)?;
            } else {
                stream.read_exact(&mut buffer)?;
                for (page, contents) in
                    (first..).zip(buffer.chunks(PAGE as usize)).filter(|(page, _)| mine[page - first])
                {
                    self.installer.put(self.address(page), contents)?;
                }
            }
            priority::yield_cpu();
            if bytes_per_s > 0 {
                let due = ((first + CHUNK) as u64 * PAGE) as f64 / bytes_per_s as f64;
                thread::sleep(Duration::from_secs_f64(due).saturating_sub(begun.elapsed()));
            }
        }
        Ok(())
    }
}

/// Moves a guest; the push is limited to so many bytes a second, without a limit if 0.
///
/// # Errors
/// No KVM, memory or userfaultfd, or the other process does not come up.
pub fn run(moved: &Moved, bytes_per_s: u64) -> Result<Served, Box<dyn std::error::Error>> {
    let source = Other::start(&["bound-source", &serde_json::to_string(moved)?])?;
    let mut stream = source.connect()?;
    let mut state = vec![0; word_from(&mut stream)? as usize];
    stream.read_exact(&mut state)?;
    let mut mirror = vec![0; moved.memory as usize];
    stream.read_exact(&mut mirror)?;
    let (memory, mut machine) = moved.machine()?;
    let region = &memory.regions()[0];
    let (uffd, installer) = watch(region)?;
    installer.make_ready(region.spec.size)?;
    let claimed = (0..moved.memory / PAGE).map(|_| AtomicBool::new(false)).collect();
    let here = Destination { hva: region.hva, installer, claimed, mirror, handler_ns: AtomicU64::new(0) };
    let here = Arc::new(here);
    let handler = Arc::clone(&here);
    answer(uffd, move |uffd| handler.handle(uffd))?;
    machine.load(&state)?;
    let (spent_before, handler_before) = (clock::process_time(), here.handler_ns.load(Ordering::Relaxed));
    let begun = Instant::now();
    stream.write_all(&[1])?;
    machine.run()?;
    let receiver_before = clock::thread_time();
    here.receive(&mut stream, bytes_per_s)?;
    let seconds = begun.elapsed().as_secs_f64();
    let receiver = clock::thread_time() - receiver_before;
    let handler = Duration::from_nanos(here.handler_ns.load(Ordering::Relaxed) - handler_before);
    let whole = clock::process_time() - spent_before;
    let sender = Duration::from_nanos(word_from(&mut stream)?);
    thread::sleep(AFTER);
    Ok(Served {
        seconds,
        bytes: moved.memory,
        machinery_cpu_s: (receiver + handler + sender).as_secs_f64(),
        vcpu_cpu_s: whole.saturating_sub(receiver + handler).as_secs_f64(),
        report: report_reader::read_newest(&memory.mapped()[0])?,
    })
}

fn word_from(stream: &mut TcpStream) -> io::Result<u64> {
    let mut word = [0; 8];
    stream.read_exact(&mut word)?;
    Ok(u64::from_le_bytes(word))
}

#[cfg(test)]
mod tests;
