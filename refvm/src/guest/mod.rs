//! The guest: what lies in its memory, and the code that its vCPUs run.
//!
//! Everything the guest needs to continue lives in guest memory and vCPU registers, so it moves with the VM. The same
//! layout serves both kinds of machine; `process` has no use for the tables and the code.
//!
//! ```text
//! 0x0001_0000  page tables: PML4, PDPT, 8 page directories; 2 MiB pages, identity, user-accessible
//! 0x0002_0000  GDT, then IDT, then one TSS a vCPU
//! 0x0003_0000  configuration page            [config::ConfigPage]
//! 0x0004_0000  ring 0 stacks, one page a vCPU
//! 0x0005_0000  ring 3 stacks, one page a vCPU (never used by the code, but a stack pointer must be right)
//! 0x0008_0000  code
//! 0x0010_0000  report header                 [report::ReportHeader]; then one block a vCPU [report::VcpuBlock]
//! 0x0012_0000  machine-check records         [report::MachineCheckRecord]
//! 0x0020_0000  bad-page bitmap, one bit a page
//! 0x0040_0000  resume table, a byte a page: in which epoch the page was touched first
//! 0x0080_0000  generation table, a u32 a page: which content the page must have
//! 0x0100_0000  the pages of the workload
//! ```
//!
//! All tables are indexed by the page number, GPA >> 12, which limits the guest to [`MAX_GPA`].

pub mod config;
pub mod content;
pub mod image;
pub mod mapped;
pub mod payload;
pub mod report;

use crate::machine::REPORT_GPA;

/// Bytes of a guest page.
pub const PAGE_SIZE: u64 = 4096;
/// GPAs end here: the tables in the kernel area reach no further.
pub const MAX_GPA: u64 = 8 << 30;
/// Most vCPUs that the tables have room for.
pub const MAX_VCPUS: u32 = 16;
/// Epochs go round from 1 to this one: a byte of the resume table, which holds 0 for a page not touched yet.
pub const EPOCHS: u64 = 255;

/// GPA of the first page table, the PML4; PDPT and page directories follow page by page.
pub const PAGE_TABLES_GPA: u64 = 0x1_0000;
/// GPA of the segment descriptors.
pub const GDT_GPA: u64 = 0x2_0000;
/// GPA of the interrupt gates.
pub const IDT_GPA: u64 = 0x2_1000;
/// GPA of the first task state segment; the next is [`TSS_STRIDE`] further.
pub const TSS_GPA: u64 = 0x2_2000;
/// Bytes from one task state segment to the next.
pub const TSS_STRIDE: u64 = 128;
/// GPA of the [`config::ConfigPage`].
pub const CONFIG_GPA: u64 = 0x3_0000;
/// GPA of the first ring 0 stack page.
pub const KERNEL_STACKS_GPA: u64 = 0x4_0000;
/// GPA of the first ring 3 stack page.
pub const USER_STACKS_GPA: u64 = 0x5_0000;
/// GPA of the code.
pub const CODE_GPA: u64 = 0x8_0000;
/// GPA of the [`report::VcpuBlock`] of vCPU 0; one page each.
pub const VCPU_BLOCKS_GPA: u64 = REPORT_GPA + PAGE_SIZE;
/// GPA of the first [`report::MachineCheckRecord`].
pub const RECORDS_GPA: u64 = 0x12_0000;
/// How many machine checks are kept; more are counted only.
pub const MAX_RECORDS: u64 = 8192;
/// GPA of the bad-page bitmap: bit N of the whole is page N.
pub const BAD_PAGES_GPA: u64 = 0x20_0000;
/// GPA of the resume table.
pub const SEEN_GPA: u64 = 0x40_0000;
/// GPA of the generation table.
pub const GENERATIONS_GPA: u64 = 0x80_0000;

/// The epoch that the guest boots in.
pub const FIRST_EPOCH: u64 = 1;
/// The epoch after a move.
pub fn next_epoch(epoch: u64) -> u64 {
    epoch % EPOCHS + 1
}
