//! The guest of `vmferry-refvm`, as files for `qemu-system-x86_64`: the same tables and code, the same workload.
//!
//! QEMU is a whole PC and knows nothing of our guest, so three things differ. The guest itself writes the first content of
//! the pages. The local APIC times its pauses. The KVM clock page tells it that it has moved.

use std::io;
use std::path::{Path, PathBuf};

use crate::guest::image::{GATES_LIMIT, KERNEL_CODE, Piece, config_page, processor_pieces, vcpu_blocks};
use crate::guest::payload::payload;
use crate::guest::{CODE_GPA, CONFIG_GPA, IDT_GPA, PAGE_SIZE, VCPU_BLOCKS_GPA};
use crate::machine::{GuestConfig, MappedRegion};
use kvm_ioctls::Kvm;

use super::boot::{BOOT_WORDS_GPA, CLOCK_GPA, CLOCK_STRIDE, TIMER_VECTOR, rom};

/// Where the hole of a PC's memory begins that is no RAM.
const LOW_END: u64 = 0xa_0000;
/// Where it ends.
const HIGH_START: u64 = 0x10_0000;

/// A file to be loaded at a GPA.
#[derive(Debug)]
pub struct Loaded {
    /// Where.
    pub gpa: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Ticks of the host's time stamp counter in a millisecond, as KVM gives it to guests.
///
/// # Errors
/// No usable `/dev/kvm`.
pub fn tsc_khz() -> Result<u64, kvm_ioctls::Error> {
    Ok(u64::from(Kvm::new()?.create_vm()?.create_vcpu(0)?.get_tsc_khz()?))
}

/// The contents of guest memory, below and above the hole.
pub fn loaded(memory: u64, config: &GuestConfig, tsc_khz: u64) -> Vec<Loaded> {
    let regions = [MappedRegion { gpa: 0, hva: 0, size: memory }];
    let mut pieces = processor_pieces(&regions, config.vcpus);
    let entry = (CODE_GPA + payload().fill) as u32;
    pieces.push(Piece { gpa: BOOT_WORDS_GPA, bytes: [config.vcpus, entry].map(u32::to_le_bytes).concat() });
    pieces.push(Piece { gpa: IDT_GPA + 16 * u64::from(TIMER_VECTOR), bytes: timer_gate() });
    let mut page = config_page(config, tsc_khz);
    page.pause_by_timer = 1;
    pieces.push(Piece { gpa: CONFIG_GPA, bytes: bytes_of(&page) });
    for (n, mut block) in (0..).zip(vcpu_blocks(&regions, config)) {
        block.clock_gpa = CLOCK_GPA + n * CLOCK_STRIDE;
        pieces.push(Piece { gpa: VCPU_BLOCKS_GPA + n * PAGE_SIZE, bytes: bytes_of(&block) });
    }
    let low = merged(pieces.iter().filter(|piece| piece.gpa < LOW_END));
    let high = merged(pieces.iter().filter(|piece| piece.gpa >= HIGH_START));
    [low, high].into_iter().flatten().collect()
}

/// An interrupt gate, ring 0, present, as those of the payload.
fn timer_gate() -> Vec<u8> {
    const { assert!((TIMER_VECTOR as u16) * 16 < GATES_LIMIT) };
    let to = CODE_GPA + payload().timer;
    let low = (to & 0xffff) | (u64::from(KERNEL_CODE) << 16) | (0x8e00 << 32) | ((to >> 16 & 0xffff) << 48);
    [low, to >> 32].map(u64::to_le_bytes).concat()
}

/// One run of bytes; a later piece goes over an earlier one.
fn merged<'a>(pieces: impl Iterator<Item = &'a Piece> + Clone) -> Option<Loaded> {
    let gpa = pieces.clone().map(|piece| piece.gpa).min()?;
    let end = pieces.clone().map(|piece| piece.gpa + piece.bytes.len() as u64).max()?;
    let mut bytes = vec![0; (end - gpa) as usize];
    for piece in pieces {
        let at = (piece.gpa - gpa) as usize;
        bytes[at..at + piece.bytes.len()].copy_from_slice(&piece.bytes);
    }
    Some(Loaded { gpa, bytes })
}

/// The bytes of a structure of integers without padding.
fn bytes_of<T: Copy>(value: &T) -> Vec<u8> {
    let start = std::ptr::from_ref(value).cast::<u8>();
    // SAFETY: the two structures passed here are `repr(C)` and of u64 alone, so every byte is initialised.
    unsafe { std::slice::from_raw_parts(start, size_of::<T>()) }.to_vec()
}

/// Writes firmware and memory contents into a directory; returns QEMU's options that load them.
///
/// # Errors
/// A file cannot be written.
pub fn write(directory: &Path, loaded: &[Loaded]) -> io::Result<Vec<String>> {
    let firmware = directory.join("firmware.bin");
    std::fs::write(&firmware, rom())?;
    let mut options = vec!["-bios".into(), text(&firmware)];
    for part in loaded {
        let path: PathBuf = directory.join(format!("at-{:x}.bin", part.gpa));
        std::fs::write(&path, &part.bytes)?;
        options.extend(["-device".into(), format!("loader,file={},addr={:#x},force-raw=on", text(&path), part.gpa)]);
    }
    Ok(options)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
