//! The stages of one fault, each measured by itself in a loop, with nothing of the pagers but a source's read of a page.
//!
//! ```text
//!  touch ─▶ FAULT ─▶ handler reads ─▶ ASK ─▶ source ─▶ READ ─▶ REPLY ─▶ handler ─▶ INSTALL ─▶ WAKE ─▶ thread resumes
//! ```

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use vmferry_pager::internals::{
    self as pager, AttachedFile, AttachedMemory, AttachedRegion, Found, Gpa, Hva, MemoryLayout, Runs,
};
use vmferry_refvm::layout::{Backing, RegionSpec, split};
use vmferry_refvm::memory::{GuestMemory, Region};

use crate::floor::scattered;
use crate::touch::{PAGE, read};
use crate::uffd::{next_fault, watch};

/// Bytes of an ask on a lane.
const ASK: usize = 16;
/// Bytes of an answer with one page: its header, and the page.
const REPLY: usize = 24 + PAGE as usize;

/// µs of each time, by the stage's name.
pub type Stages = BTreeMap<&'static str, Vec<f64>>;

/// The error of another thread.
type Failure = Box<dyn std::error::Error>;

/// All stages of a fault on memory of one kind.
///
/// # Errors
/// No userfaultfd, memory or network.
pub fn run(times: u64, pause_us: u64, backing: Backing) -> Result<Stages, Failure> {
    let pause = Duration::from_micros(pause_us);
    let order = scattered(times, times.max(4096).next_power_of_two());
    let (fault, wake) = local_faults(&order, pause, backing)?;
    let install = installs(&order, pause, backing)?;
    Ok(BTreeMap::from([
        ("fault", fault),
        ("ask", one_way(ASK, times, pause)?),
        ("read", reads(&order, pause, backing)?),
        ("reply", one_way(REPLY, times, pause)?),
        ("install", install),
        ("wake", wake),
    ]))
}

fn memory(order: &[u64], backing: Backing) -> Result<GuestMemory, Failure> {
    let pages = order.iter().max().map_or(1, |last| last + 1);
    Ok(GuestMemory::new(&split((pages * PAGE).max(64 << 20), 1, backing)?)?)
}

fn us(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1e6
}

/// From the touch until another thread has read the event; from that thread's wake-up call until the touch is over.
fn local_faults(order: &[u64], pause: Duration, backing: Backing) -> Result<(Vec<f64>, Vec<f64>), Failure> {
    let memory = memory(order, backing)?;
    let region = &memory.regions()[0];
    let (uffd, installer) = watch(region)?;
    let (fd, count) = (uffd.as_raw_fd(), order.len());
    let handler = std::thread::Builder::new().name("handler".into()).spawn(move || -> io::Result<_> {
        let mut buffer = vec![0; PAGE as usize];
        let (mut read_at, mut woken_at) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for _ in 0..count {
            let at = next_fault(fd)?;
            read_at.push(Instant::now());
            let room = installer.room(at, &mut buffer);
            room[0] = 1;
            installer.install(at, room, false)?;
            woken_at.push(Instant::now());
            installer.wake(at)?;
        }
        Ok((read_at, woken_at))
    })?;
    let (mut touched_at, mut over_at) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for page in order {
        touched_at.push(Instant::now());
        read(region.hva + page * PAGE).ok_or("a page is poisoned")?;
        over_at.push(Instant::now());
        std::thread::sleep(pause);
    }
    let (read_at, woken_at) = handler.join().map_err(|_| "the handler failed")??;
    Ok((between(&touched_at, &read_at), between(&woken_at, &over_at)))
}

fn between(from: &[Instant], to: &[Instant]) -> Vec<f64> {
    from.iter().zip(to).map(|(from, to)| us(*from, *to)).collect()
}

/// COPY, or CONTINUE of a page whose contents have just been written; nobody waits for it.
fn installs(order: &[u64], pause: Duration, backing: Backing) -> Result<Vec<f64>, Failure> {
    let memory = memory(order, backing)?;
    let (_uffd, installer) = watch(&memory.regions()[0])?;
    let mut buffer = vec![0; PAGE as usize];
    let mut found = Vec::with_capacity(order.len());
    for page in order {
        let at = memory.regions()[0].hva + page * PAGE;
        let room = installer.room(at, &mut buffer);
        room.fill(1);
        let begun = Instant::now();
        installer.install(at, room, true)?;
        found.push(us(begun, Instant::now()));
        std::thread::sleep(pause);
    }
    Ok(found)
}

/// One page of the guest read as the source's pager does, of this process's own memory, which is all there.
fn reads(order: &[u64], pause: Duration, backing: Backing) -> Result<Vec<f64>, Failure> {
    let memory = memory(order, backing)?;
    let region = &memory.regions()[0];
    for page in 0..region.spec.size / PAGE {
        // SAFETY: a word of the mapping.
        unsafe { ((region.hva + page * PAGE) as *mut u64).write_volatile(1) };
    }
    let source = source(region)?;
    source.map_ahead(|| true);
    let (mut buffer, mut runs) = (vec![0; PAGE as usize], Runs::default());
    let mut found = Vec::with_capacity(order.len());
    for page in order {
        let begun = Instant::now();
        source.read(0, *page, 1, &mut buffer, &mut runs)?;
        found.push(us(begun, Instant::now()));
        if !runs.iter().eq([Found::Data(1)]) {
            return Err(format!("page {page} was written, and is read as {runs:?}").into());
        }
        std::thread::sleep(pause);
    }
    Ok(found)
}

/// A region of this process as a source's pager has it.
fn source(region: &Region) -> Result<pager::GuestMemory, Failure> {
    let (backing, file) = match &region.file {
        Some(file) => (pager::Backing::Memfd, Some(AttachedFile { fd: file.try_clone()?.into(), offset: 0 })),
        None => (pager::Backing::Anonymous, None),
    };
    let RegionSpec { gpa, size, page_size, .. } = region.spec;
    let layout = MemoryLayout::new(vec![pager::Region { gpa: Gpa(gpa), size, page_size, backing }])?;
    Ok(pager::GuestMemory::new(AttachedMemory {
        vmm_pid: std::process::id(),
        layout,
        regions: vec![AttachedRegion { hva: Hva(region.hva), file, uffd: None }],
        uffds: Vec::new(),
        collapse: false,
    })?)
}

/// From before `send` to after `recv` by a thread that waits in it, over loopback.
fn one_way(bytes: usize, times: u64, pause: Duration) -> Result<Vec<f64>, Failure> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut sender = TcpStream::connect(listener.local_addr()?)?;
    sender.set_nodelay(true)?;
    let (mut stream, _) = listener.accept()?;
    let (arrived, arrivals) = channel();
    let receiver = std::thread::Builder::new().name("receiver".into()).spawn(move || -> io::Result<()> {
        let mut buffer = vec![0; bytes];
        for _ in 0..times {
            stream.read_exact(&mut buffer)?;
            if arrived.send(Instant::now()).is_err() {
                break;
            }
        }
        Ok(())
    })?;
    let message = vec![1; bytes];
    let mut found = Vec::new();
    for _ in 0..times {
        let begun = Instant::now();
        sender.write_all(&message)?;
        found.push(us(begun, arrivals.recv()?));
        std::thread::sleep(pause);
    }
    receiver.join().map_err(|_| "the receiver failed")??;
    Ok(found)
}

#[cfg(test)]
mod tests;
