//! The contents of guest memory before the first instruction, as pieces: pure, so that tests can look at them.

use super::config::{ConfigPage, MAX_RUNS, Run, shares};
use super::payload::{STUB_BYTES, payload};
use super::report::VcpuBlock;
use super::{CODE_GPA, GDT_GPA, IDT_GPA, KERNEL_STACKS_GPA, MAX_GPA, PAGE_SIZE, PAGE_TABLES_GPA, TSS_GPA, TSS_STRIDE};
use crate::machine::{GuestConfig, MappedRegion};

/// Selector of ring 0 code.
pub const KERNEL_CODE: u16 = 0x08;
/// Selector of ring 0 data.
pub const KERNEL_DATA: u16 = 0x10;
/// Selector of ring 3 code, with the requested privilege level.
pub const USER_CODE: u16 = 0x18 | 3;
/// Selector of ring 3 data, with the requested privilege level.
pub const USER_DATA: u16 = 0x20 | 3;
/// Selector of the first vCPU's task state segment; each takes 16 bytes.
pub const FIRST_TSS: u16 = 0x30;
/// Limit of a task state segment: without an I/O bitmap.
pub const TSS_LIMIT: u32 = 103;

const VECTORS: usize = 32;
/// Vectors with an error code (SDM vol. 3, 6.3.1): 8, 10 to 14, 17, 21.
const WITH_ERROR_CODE: u32 = 1 << 8 | 0x1f << 10 | 1 << 17 | 1 << 21;
const STUBS_OFFSET: u64 = 0x8000;

const PRESENT_WRITABLE_USER: u64 = 0b111;
const LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

/// Bytes that belong at a guest-physical address.
#[derive(Debug, Clone)]
pub struct Piece {
    /// Where.
    pub gpa: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

fn words(gpa: u64, words: &[u64]) -> Piece {
    Piece { gpa, bytes: words.iter().flat_map(|word| word.to_le_bytes()).collect() }
}

/// Tables and code for processors in 64-bit mode.
pub fn processor_pieces(regions: &[MappedRegion], vcpus: u32) -> Vec<Piece> {
    let mut pieces = page_tables(regions);
    pieces.extend([descriptors(vcpus), gates(), Piece { gpa: CODE_GPA, bytes: payload().code.to_vec() }, stubs()]);
    pieces.extend((0..vcpus).map(task_state));
    pieces
}

/// Identity map of all RAM with 2 MiB pages, for ring 3 as well.
fn page_tables(regions: &[MappedRegion]) -> Vec<Piece> {
    let (pdpt, directories) = (PAGE_TABLES_GPA + PAGE_SIZE, PAGE_TABLES_GPA + 2 * PAGE_SIZE);
    let is_ram = |gpa: u64| regions.iter().any(|r| r.gpa < gpa + LARGE_PAGE && gpa < r.gpa + r.size);
    let entries: Vec<u64> = (0..MAX_GPA / LARGE_PAGE)
        .map(|n| n * LARGE_PAGE)
        .map(|gpa| if is_ram(gpa) { gpa | LARGE | PRESENT_WRITABLE_USER } else { 0 })
        .collect();
    let directory_entries: Vec<u64> =
        (0..MAX_GPA / GIB).map(|n| (directories + n * PAGE_SIZE) | PRESENT_WRITABLE_USER).collect();
    vec![
        words(PAGE_TABLES_GPA, &[pdpt | PRESENT_WRITABLE_USER]),
        words(pdpt, &directory_entries),
        words(directories, &entries),
    ]
}

fn descriptors(vcpus: u32) -> Piece {
    let flat = |access: u64, flags: u64| 0xffff | (access << 40) | (0xf << 48) | (flags << 52);
    let mut table = vec![0, flat(0x9b, 0xa), flat(0x93, 0xc), flat(0xfb, 0xa), flat(0xf3, 0xc), 0];
    for vcpu in 0..u64::from(vcpus) {
        // Bits 23:0 and 31:24 of the base apart; type 9: an available 64-bit TSS. All bases are below 4 GiB.
        let base = TSS_GPA + vcpu * TSS_STRIDE;
        let low = u64::from(TSS_LIMIT) | ((base & 0xff_ffff) << 16) | (0x89 << 40) | ((base >> 24) << 56);
        table.extend([low, 0]);
    }
    words(GDT_GPA, &table)
}

/// Bytes of the descriptor table.
pub fn descriptors_limit(vcpus: u32) -> u16 {
    FIRST_TSS + 16 * vcpus as u16 - 1
}

/// Bytes of the gate table, less one.
pub const GATES_LIMIT: u16 = (VECTORS * 16 - 1) as u16;

fn gates() -> Piece {
    let code = payload();
    let gate = |vector: usize| {
        let to = match vector {
            6 => CODE_GPA + code.invalid_opcode,
            18 => CODE_GPA + code.machine_check,
            _ => CODE_GPA + STUBS_OFFSET + (vector * STUB_BYTES) as u64,
        };
        // An interrupt gate, ring 0, present, IST 0.
        let low = (to & 0xffff) | (u64::from(KERNEL_CODE) << 16) | (0x8e00 << 32) | ((to >> 16 & 0xffff) << 48);
        [low, to >> 32]
    };
    words(IDT_GPA, &(0..VECTORS).flat_map(gate).collect::<Vec<_>>())
}

/// `push 0` where the processor pushes no error code, `push vector`, `jmp fatal`.
fn stubs() -> Piece {
    let fatal = payload().fatal as i64;
    let mut bytes = Vec::with_capacity(VECTORS * STUB_BYTES);
    for vector in 0..VECTORS {
        let end = (vector + 1) * STUB_BYTES;
        if WITH_ERROR_CODE >> vector & 1 == 0 {
            bytes.extend([0x6a, 0]);
        }
        bytes.extend([0x6a, vector as u8, 0xe9]);
        let after = STUBS_OFFSET as i64 + bytes.len() as i64 + 4;
        bytes.extend(((fatal - after) as i32).to_le_bytes());
        bytes.resize(end, 0xcc);
    }
    Piece { gpa: CODE_GPA + STUBS_OFFSET, bytes }
}

/// Only RSP0 and the (absent) I/O bitmap count in 64-bit mode.
fn task_state(vcpu: u32) -> Piece {
    let mut bytes = vec![0; 104];
    let stack = KERNEL_STACKS_GPA + (u64::from(vcpu) + 1) * PAGE_SIZE;
    bytes[4..12].copy_from_slice(&stack.to_le_bytes());
    bytes[102..104].copy_from_slice(&104u16.to_le_bytes());
    Piece { gpa: TSS_GPA + u64::from(vcpu) * TSS_STRIDE, bytes }
}

/// Each vCPU's block at boot; `config` has at most `MAX_VCPUS` vCPUs.
pub fn vcpu_blocks(regions: &[MappedRegion], config: &GuestConfig) -> Vec<VcpuBlock> {
    let block = |(id, share): (usize, Vec<Run>)| {
        let pages: u64 = share.iter().map(|run| run.count).sum();
        let mut runs = [Run::default(); MAX_RUNS];
        runs.iter_mut().zip(&share).for_each(|(slot, run)| *slot = *run);
        VcpuBlock {
            id: id as u64,
            epoch: 0,
            touches: 0,
            writes: 0,
            skips: 0,
            wrong_bytes: 0,
            passes: 0,
            steps: 0,
            cursor: 0,
            rng: (config.seed ^ (id as u64 + 1).wrapping_mul(super::content::PAGE_FACTOR)) | 1,
            pages,
            hot_pages: (pages / 10).max(1),
            first_touch_max: 0,
            runs,
            clock_gpa: 0,
            last_tsc: 0,
            blackout: 0,
            reserved: [0; 224],
            first_touch: [0; super::report::BUCKETS],
        }
    };
    shares(regions, config.vcpus).into_iter().enumerate().map(block).collect()
}

/// The configuration page.
pub fn config_page(config: &GuestConfig, tsc_khz: u64) -> ConfigPage {
    ConfigPage::new(config, tsc_khz)
}

#[cfg(test)]
mod tests;
