//! A VMM of one thread that touches pages one at a time, with a pause after each, and times every touch.
//!
//! A touch is `process_vm_readv` of 8 bytes of its own memory: it waits for the page as a load does, and a poisoned page
//! is an error, not a signal. So pages with data and poisoned ones are timed alike.

use std::io::{self, BufRead, Write};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmferry_refvm::guest::content;
use vmferry_refvm::layout::{Backing, split};
use vmferry_refvm::memory::GuestMemory;
use vmferry_refvm::pager_link::PagerLink;
use vmferry_refvm::protocol::message::Poisoned;
use vmferry_refvm::userfaultfd::{MODE_MISSING, Userfaultfd, feature_bit};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Seed of the pages' content.
const SEED: u64 = 7;

/// Which pages to touch: a line of standard input.
#[derive(Debug, Deserialize)]
pub struct Wanted {
    /// Their numbers, in order.
    pub pages: Vec<u64>,
    /// After each touch.
    pub pause_us: u64,
}

/// The result, in the order of the pages.
#[derive(Debug, Default, Serialize)]
pub struct Touched {
    /// How long each took.
    pub us: Vec<f64>,
    /// Pages that are poisoned.
    pub poison: Vec<u64>,
    /// Pages with wrong content.
    pub wrong: Vec<u64>,
}

/// The content of a page, as its second word says: the first two are the page's number and 0.
pub fn word(page: u64) -> u64 {
    content::words(SEED, page, 0).nth(2).unwrap_or(0)
}

/// Touches the pages of a mapping that begins at `hva`.
pub fn touch(hva: u64, wanted: &Wanted) -> Touched {
    let mut touched = Touched::default();
    for page in &wanted.pages {
        let begun = Instant::now();
        let found = read(hva + page * PAGE + 16);
        touched.us.push(begun.elapsed().as_secs_f64() * 1e6);
        match found {
            None => touched.poison.push(*page),
            Some(found) if found != word(*page) => touched.wrong.push(*page),
            Some(_) => {}
        }
        std::thread::sleep(Duration::from_micros(wanted.pause_us));
    }
    touched
}

/// The word at `hva` of this process; `None` if its page is poisoned.
pub fn read(hva: u64) -> Option<u64> {
    let mut value = 0u64;
    let local = libc::iovec { iov_base: std::ptr::from_mut(&mut value).cast(), iov_len: 8 };
    let remote = libc::iovec { iov_base: hva as *mut libc::c_void, iov_len: 8 };
    // SAFETY: the local vector is `value`; the remote one is only an address, which the kernel checks.
    let count = unsafe { libc::process_vm_readv(std::process::id() as libc::pid_t, &local, 1, &remote, 1, 0) };
    (count == 8).then_some(value)
}

/// A source's memory, full of content, attached to its pager until standard input ends.
///
/// # Errors
/// No memory, or the pager refuses it.
pub fn hold(socket: &str, vm: &str, memory_mib: u64, backing: Backing) -> Result<(), Box<dyn std::error::Error>> {
    let memory = GuestMemory::new(&split(memory_mib << 20, 1, backing)?)?;
    let region = &memory.regions()[0];
    for page in 0..region.spec.size / PAGE {
        // SAFETY: a page of the mapping, aligned, and no other thread uses it.
        let words = unsafe { &mut *((region.hva + page * PAGE) as *mut [u64; content::WORDS]) };
        content::fill(SEED, page, 0, words);
    }
    let (events, _inbox) = channel::<Poisoned>();
    let _link = PagerLink::attach(socket, vm, &memory, &[], events)?;
    say("attached")?;
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}

/// A destination's memory, attached to its pager; touches the pages that the lines of standard input name, and answers each.
///
/// # Errors
/// No memory or userfaultfd, the pager refuses it, or a line cannot be read.
pub fn serve(
    socket: &str,
    vm: &str,
    memory_mib: u64,
    backing: Backing,
    features: &[String],
) -> Result<(), Box<dyn std::error::Error>> {
    let memory = GuestMemory::new(&split(memory_mib << 20, 1, backing)?)?;
    let region = &memory.regions()[0];
    let bits = features
        .iter()
        .map(|name| feature_bit(name).ok_or("an unknown feature"))
        .try_fold(0, |a, b| b.map(|b| a | b))?;
    let uffd = Arc::new(Userfaultfd::new(bits)?);
    uffd.register(region.hva, region.spec.size, MODE_MISSING)?;
    let (events, _inbox) = channel::<Poisoned>();
    let _link = PagerLink::attach(socket, vm, &memory, std::slice::from_ref(&uffd), events)?;
    say("attached")?;
    for line in io::stdin().lock().lines() {
        let touched = touch(region.hva, &serde_json::from_str(&line?)?);
        say(&serde_json::to_value(touched)?)?;
    }
    Ok(())
}

/// A line of standard output.
pub fn say(what: impl Serialize) -> io::Result<()> {
    let mut output = io::stdout().lock();
    writeln!(output, "{}", serde_json::to_string(&what)?)?;
    output.flush()
}
