//! The pages that a loaded vCPU needs for its first instruction: its page tables, its code, and the targets of its
//! registers. A touch before the start brings them while the daemons write their journals. Without it the guest waits for
//! each of them in turn.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::guest::mapped::hva_of;
use crate::machine::MappedRegion;
use crate::report_reader::value_at;

/// `EFER.LMA`: 64-bit mode.
const LONG_MODE: u64 = 1 << 10;
/// `CR4.LA57`: five levels.
const FIVE_LEVELS: u64 = 1 << 12;
/// A page table entry that maps something.
const PRESENT: u64 = 1;
/// An entry above the last level that maps a page.
const LARGE: u64 = 1 << 7;
/// Where an entry points to (Intel SDM vol. 3A, 4.5).
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The next pages of a vCPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirstPages {
    tables: u64,
    levels: u32,
    /// Linear addresses; those that are none of the guest's are passed over.
    linear: Vec<u64>,
}

impl FirstPages {
    /// Of a vCPU in 64-bit mode; none of one that is in another.
    pub fn of(regs: &kvm_regs, sregs: &kvm_sregs) -> Option<Self> {
        let levels = if sregs.cr4 & FIVE_LEVELS == 0 { 4 } else { 5 };
        let linear = vec![
            regs.rip, regs.rsp, regs.rbp, regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.r8, regs.r9,
            regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ];
        (sregs.efer & LONG_MODE != 0).then_some(Self { tables: sregs.cr3 & ADDRESS, levels, linear })
    }

    /// Reads a word of each; `read` gives the word at a guest-physical address, if it can be read.
    pub fn touch(&self, mut read: impl FnMut(u64) -> Option<u64>) {
        for linear in &self.linear {
            let _ = walk(self.tables, self.levels, *linear, &mut read).and_then(|gpa| read(gpa & !7));
        }
    }
}

/// Where a linear address is, by the guest's own tables (Intel SDM vol. 3A, 4.5).
fn walk(tables: u64, levels: u32, linear: u64, read: &mut impl FnMut(u64) -> Option<u64>) -> Option<u64> {
    let mut table = tables;
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let entry = read(table + 8 * (linear >> shift & 0x1ff)).filter(|entry| entry & PRESENT != 0)?;
        if level == 0 || (level < 3 && entry & LARGE != 0) {
            let inside = (1 << shift) - 1;
            return Some(entry & ADDRESS & !inside | linear & inside);
        }
        table = entry & ADDRESS;
    }
    None
}

/// The thread that touches them for a machine. Dropped: it touches no further page.
#[derive(Debug, Default)]
pub struct Helper(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// Its id; 0: there is none yet.
    thread: AtomicU32,
    ended: AtomicBool,
}

impl Helper {
    /// Whether this is its id.
    pub fn is(&self, thread: u32) -> bool {
        thread != 0 && thread == self.0.thread.load(Ordering::SeqCst)
    }

    /// Touches pages. It waits for each: one that does not come holds nobody up, and one that is poisoned is passed over.
    pub fn touch(&self, all: Vec<FirstPages>, regions: Arc<[MappedRegion]>) {
        let state = self.0.clone();
        let body = move || {
            // SAFETY: no memory is passed.
            state.thread.store(unsafe { libc::gettid() } as u32, Ordering::SeqCst);
            let wanted = |gpa| hva_of(&regions, gpa).filter(|_| !state.ended.load(Ordering::SeqCst));
            all.iter().for_each(|pages| pages.touch(|gpa| value_at(wanted(gpa)?).ok()));
        };
        if let Err(error) = std::thread::Builder::new().name("first-pages".into()).spawn(body) {
            tracing::warn!(%error, "kvm.first_pages_not_touched");
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests;
