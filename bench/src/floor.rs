//! The floor: the cost of a page fault with nothing but userfaultfd and TCP between two processes.
//!
//! ```text
//!  touch ──▶ kernel ──▶ handler: read(uffd) ──8 bytes──▶ source: read, write
//!                       COPY or CONTINUE ◀──4096 bytes──┘
//! ```
//! One thread each, blocking, nothing else done. A page of a memfd is received where it will be, and mapped. No migration
//! can be faster with these means, but by spinning.

use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::RawFd;

use vmferry_refvm::layout::{Backing, split};
use vmferry_refvm::memory::GuestMemory;

use crate::other::Other;
use crate::touch::{PAGE, Touched, Wanted, say, touch, word};
use crate::uffd::{Installer, answer, next_fault, watch};

/// The other process: answers each page number with the page.
///
/// # Errors
/// Of the network.
pub fn source() -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    say(listener.local_addr()?.port())?;
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let (mut number, mut page) = ([0; 8], vec![0; PAGE as usize]);
    loop {
        match stream.read_exact(&mut number) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        }
        page[16..24].copy_from_slice(&word(u64::from_le_bytes(number)).to_le_bytes());
        stream.write_all(&page)?;
    }
}

/// Touches `touches` pages, one at a time; `source_cpus`: where the other process runs.
///
/// # Errors
/// No userfaultfd, or the other process does not come up.
pub fn run(
    touches: u64,
    pause_us: u64,
    backing: Backing,
    source_cpus: &str,
) -> Result<Touched, Box<dyn std::error::Error>> {
    let pages = touches.max((64 << 20) / PAGE).next_power_of_two();
    let memory = GuestMemory::new(&split(pages * PAGE, 1, backing)?)?;
    let region = &memory.regions()[0];
    let hva = region.hva;
    let (uffd, installer) = watch(region)?;
    let source = Other::start(&["--cpus", source_cpus, "floor-source"])?;
    let stream = source.connect()?;
    answer(uffd, move |uffd| handle(uffd, hva, &installer, stream))?;
    Ok(touch(hva, &Wanted { pages: scattered(touches, pages), pause_us }))
}

/// `touches` of `pages` pages, none twice, in no order. `pages` is a power of two, so an odd stride shares no
/// divisor with it.
pub fn scattered(touches: u64, pages: u64) -> Vec<u64> {
    (0..touches).map(|n| n.wrapping_mul(0x9e37_79b1) % pages).collect()
}

fn handle(uffd: RawFd, hva: u64, installer: &Installer, mut stream: TcpStream) -> io::Result<Infallible> {
    let mut buffer = vec![0; PAGE as usize];
    loop {
        let at = next_fault(uffd)?;
        stream.write_all(&((at - hva) / PAGE).to_le_bytes())?;
        let room = installer.room(at, &mut buffer);
        stream.read_exact(room)?;
        installer.install(at, room, true)?;
    }
}

#[cfg(test)]
mod tests;
