//! The floor: what a page fault costs with nothing but userfaultfd and TCP between two processes.
//!
//! ```text
//!  touch ──▶ kernel ──▶ handler: read(uffd) ──8 bytes──▶ source: read, write
//!                       UFFDIO_COPY ◀──────4096 bytes──┘
//! ```
//! One thread each, blocking, nothing else done. No migration can be faster with these means, but by spinning.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::process::{Command, Stdio};

use vmferry_refvm::guest::content::WORDS;
use vmferry_refvm::layout::{Backing, split};
use vmferry_refvm::memory::GuestMemory;
use vmferry_refvm::userfaultfd::{MODE_MISSING, Userfaultfd};

use crate::touch::{PAGE, Touched, Wanted, say, touch, word};

/// `_IOWR(0xAA, 0x03, struct uffdio_copy)` of linux/userfaultfd.h.
const UFFDIO_COPY: libc::c_ulong = 0xC028_AA03;
/// `UFFD_EVENT_PAGEFAULT`.
const PAGEFAULT: u8 = 0x12;
/// Bytes of `struct uffd_msg`; the address of a fault is at 16.
const MESSAGE: usize = 32;

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

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

/// Touches `touches` pages, one at a time.
///
/// # Errors
/// No userfaultfd, or the other process does not come up.
pub fn run(touches: u64, pause_us: u64) -> Result<Touched, Box<dyn std::error::Error>> {
    let pages = (touches * PAGE).max(64 << 20) / PAGE;
    let memory = GuestMemory::new(&split(pages * PAGE, 1, Backing::Anonymous)?)?;
    let hva = memory.regions()[0].hva;
    let uffd = Userfaultfd::new(0)?;
    uffd.register(hva, pages * PAGE, MODE_MISSING)?;
    let mut child = Command::new(std::env::current_exe()?).arg("floor-source").stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut line)?;
    let stream = TcpStream::connect(("127.0.0.1", line.trim().parse()?))?;
    stream.set_nodelay(true)?;
    let fd = uffd.as_raw_fd();
    // Ends with the process: it waits for faults that do not come any more.
    std::thread::Builder::new().name("handler".into()).spawn(move || handle(fd, hva, stream))?;
    // A stride that is coprime to every count of pages that is a power of two: no page twice, and no order.
    let order = (0..touches).map(|n| n.wrapping_mul(0x9e37_79b1) % pages).collect();
    let touched = touch(hva, &Wanted { pages: order, pause_us });
    child.kill()?;
    child.wait()?;
    Ok(touched)
}

fn handle(uffd: RawFd, hva: u64, mut stream: TcpStream) -> io::Result<()> {
    let mut page = [0u64; WORDS];
    let mut message = [0u8; MESSAGE];
    loop {
        let mut ready = libc::pollfd { fd: uffd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd.
        unsafe { libc::poll(&raw mut ready, 1, -1) };
        // SAFETY: the buffer is as long as said.
        if unsafe { libc::read(uffd, message.as_mut_ptr().cast(), MESSAGE) } != MESSAGE as isize
            || message[0] != PAGEFAULT
        {
            continue;
        }
        let mut address = [0; 8];
        address.copy_from_slice(&message[16..24]);
        let at = u64::from_le_bytes(address) & !(PAGE - 1);
        stream.write_all(&((at - hva) / PAGE).to_le_bytes())?;
        // SAFETY: the array's bytes; any value of them is a value of the array.
        let bytes = unsafe { std::slice::from_raw_parts_mut(page.as_mut_ptr().cast::<u8>(), PAGE as usize) };
        stream.read_exact(bytes)?;
        let mut copy = UffdioCopy { dst: at, src: page.as_ptr() as u64, len: PAGE, mode: 0, copy: 0 };
        // SAFETY: the structure of this request; the kernel checks both addresses.
        if unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY, &raw mut copy) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
}
