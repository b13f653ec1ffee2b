//! The stages of one fault, each measured by itself in a loop, with nothing of the pagers.
//!
//! ```text
//!  touch ─▶ FAULT ─▶ handler reads ─▶ ASK ─▶ source ─▶ READ ─▶ REPLY ─▶ handler ─▶ INSTALL ─▶ WAKE ─▶ thread goes on
//! ```

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use vmferry_refvm::layout::{Backing, split};
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

/// What an error of another thread may be.
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
            installer.install(at, room.as_ptr(), false)?;
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
        let room = room.as_ptr();
        let begun = Instant::now();
        installer.install(at, room, true)?;
        found.push(us(begun, Instant::now()));
        std::thread::sleep(pause);
    }
    Ok(found)
}

/// A page of the guest into a buffer: `process_vm_readv` (of this process's own memory), or `pread` of the memfd.
fn reads(order: &[u64], pause: Duration, backing: Backing) -> Result<Vec<f64>, Failure> {
    let memory = memory(order, backing)?;
    let region = &memory.regions()[0];
    for page in order {
        // SAFETY: a word of the mapping.
        unsafe { ((region.hva + page * PAGE) as *mut u64).write_volatile(1) };
    }
    let mut buffer = vec![0; PAGE as usize];
    let mut found = Vec::with_capacity(order.len());
    for page in order {
        let begun = Instant::now();
        let count = read_page(region, *page, &mut buffer);
        found.push(us(begun, Instant::now()));
        if count != PAGE as isize {
            return Err(io::Error::last_os_error().into());
        }
        std::thread::sleep(pause);
    }
    Ok(found)
}

fn read_page(region: &Region, page: u64, buffer: &mut [u8]) -> isize {
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    match &region.file {
        // SAFETY: the buffer is as long as said.
        Some(file) => unsafe {
            libc::pread(file.as_raw_fd(), local.iov_base, local.iov_len, (page * PAGE) as libc::off_t)
        },
        None => {
            let hva = (region.hva + page * PAGE) as *mut libc::c_void;
            let remote = libc::iovec { iov_base: hva, iov_len: local.iov_len };
            // SAFETY: the local vector is the buffer; the kernel checks the remote one.
            unsafe { libc::process_vm_readv(std::process::id() as libc::pid_t, &local, 1, &remote, 1, 0) }
        }
    }
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
mod tests {
    use super::*;

    #[test]
    fn every_stage_is_measured_as_often_as_asked() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let stages = match run(20, 0, backing) {
                Ok(stages) => stages,
                Err(error) => return println!("SKIPPED: {error}"),
            };
            assert_eq!(
                stages.keys().copied().collect::<Vec<_>>(),
                ["ask", "fault", "install", "read", "reply", "wake"]
            );
            assert!(stages.values().all(|us| us.len() == 20 && us.iter().all(|us| *us > 0.0)), "{stages:?}");
        }
    }
}
