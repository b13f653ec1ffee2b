//! Firmware of our own for a PC: brings every processor from its reset straight into ring 3 of the guest's payload.
//!
//! QEMU maps it at the top of 4 GiB and at 0xf0000, where all of its code runs. It goes from real mode to 64-bit mode in one
//! step (SDM vol. 3, 10.8.5 allows to set PE and PG together). It is short, because some hosts emulate all of it slowly.
//! Processor 0 wakes the others, which begin at [`AP_OFFSET`]. Each takes the next number from a counter.

use std::arch::global_asm;

use crate::guest::image::{FIRST_TSS, GATES_LIMIT, KERNEL_CODE, KERNEL_DATA, USER_CODE, USER_DATA};
use crate::guest::{
    CONFIG_GPA, GDT_GPA, IDT_GPA, KERNEL_STACKS_GPA, MAX_VCPUS, PAGE_SIZE, PAGE_TABLES_GPA, USER_STACKS_GPA,
    VCPU_BLOCKS_GPA,
};

/// Bytes of the firmware.
pub const ROM_BYTES: usize = 64 << 10;
/// Where it runs, as a real-mode segment.
const ROM_SEGMENT: u16 = 0xf000;
/// Where a processor begins that was woken: the SIPI vector [`AP_VECTOR`] names this page.
const AP_OFFSET: usize = 0xf000;
const AP_VECTOR: u32 = 0xff;
/// Where processor 0 begins.
const RESET_OFFSET: usize = 0xfff0;
/// GPA of the word that hands out the processors' numbers; nothing else is below the page tables.
const COUNTER_GPA: u64 = 0x7000;
/// GPA of the words that say how many processors there are, and which address the payload begins at (below 4 GiB).
pub const BOOT_WORDS_GPA: u64 = 0x7008;
/// GPA of the first processor's clock page; 64 bytes each.
pub const CLOCK_GPA: u64 = 0x8000;
/// Bytes from one clock page to the next.
pub const CLOCK_STRIDE: u64 = 64;
/// Vector of the local APIC's timer: of the 32 that the guest's table has, one that no exception uses.
pub const TIMER_VECTOR: u8 = 30;

/// PE, MP, ET, NE, WP, AM, PG, as our own VMM sets them.
const CR0: u32 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 18 | 1 << 31;
/// PAE, MCE, OSFXSR, OSXMMEXCPT.
const CR4: u32 = 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10;
/// LME, NXE.
const EFER: u32 = 1 << 8 | 1 << 11;

global_asm!(
    ".pushsection .rodata.vmferry_boot, \"a\"",
    ".p2align 4",
    ".hidden vmferry_boot_start",
    ".globl vmferry_boot_start",
    "vmferry_boot_start:",
    ".code16",
    "cli",
    "cld",
    "xorw %ax, %ax",
    "movw %ax, %ds",
    "movl $1, %ebx",
    "lock xaddl %ebx, ({counter})",
    "lgdtl %cs:(.Lboot_gdt - vmferry_boot_start)",
    "lidtl %cs:(.Lboot_idt - vmferry_boot_start)",
    "movl ${cr4}, %eax",
    "movl %eax, %cr4",
    "movl ${page_tables}, %eax",
    "movl %eax, %cr3",
    "movl $0xc0000080, %ecx",
    "xorl %edx, %edx",
    "movl ${efer}, %eax",
    "wrmsr",
    "movl ${cr0}, %eax",
    "movl %eax, %cr0",
    "ljmpl ${kernel_code}, $(0xf0000 + .Lboot_long - vmferry_boot_start)",
    ".Lboot_gdt:",
    ".word {gdt_limit}",
    ".long {gdt}",
    ".Lboot_idt:",
    ".word {idt_limit}",
    ".long {idt}",
    ".code64",
    ".Lboot_long:",
    "movl ${kernel_data}, %eax",
    "movl %eax, %ss",
    "movl %eax, %ds",
    "movl %eax, %es",
    // r15: the processor's block, r13: the configuration, r14: the first epoch; rbx: the processor's number.
    "movl %ebx, %ebx",
    "movq %rbx, %rdi",
    "shlq $12, %rdi",
    "leaq ({kernel_stacks} + {page})(%rdi), %rsp",
    "leaq ({user_stacks} + {page})(%rdi), %rsi",
    "leaq {blocks}(%rdi), %r15",
    "movl ${config}, %r13d",
    "movl $1, %r14d",
    "movl %ebx, %eax",
    "shll $4, %eax",
    "addl ${first_tss}, %eax",
    "ltr %ax",
    // The local APIC in x2APIC mode, its timer one-shot in ns, and the old interrupt controllers silent.
    "movl $0x1b, %ecx",
    "rdmsr",
    "orl $0xc00, %eax",
    "wrmsr",
    "xorl %edx, %edx",
    "movl $0x80f, %ecx",
    "movl $0x1ff, %eax",
    "wrmsr",
    "movl $0x835, %ecx",
    "movl $0x10000, %eax",
    "wrmsr",
    "movl $0x83e, %ecx",
    "movl $0xb, %eax",
    "wrmsr",
    "movl $0x832, %ecx",
    "movl ${timer_vector}, %eax",
    "wrmsr",
    "movb $0xff, %al",
    "outb %al, $0x21",
    "outb %al, $0xa1",
    // The clock page.
    "movl $0x4b564d01, %ecx",
    "movl %ebx, %eax",
    "shll $6, %eax",
    "addl ${clock} + 1, %eax",
    "wrmsr",
    // Processor 0 wakes the others: INIT and start-up to all but itself.
    "testl %ebx, %ebx",
    "jnz .Lboot_go",
    "cmpl $1, {words}",
    "je .Lboot_go",
    "movl $0x830, %ecx",
    "movl $0xc4500, %eax",
    "wrmsr",
    "movl $2000, %edi",
    ".Lboot_wait:",
    "decl %edi",
    "jnz .Lboot_wait",
    "movl $0xc4600 + {ap_vector}, %eax",
    "wrmsr",
    ".Lboot_go:",
    "movl ${user_data}, %eax",
    "movl %eax, %ds",
    "movl %eax, %es",
    "movl %eax, %fs",
    "movl %eax, %gs",
    "pushq %rax",
    "pushq %rsi",
    "pushq $2",
    "pushq ${user_code}",
    "movl {words} + 4, %eax",
    "pushq %rax",
    "iretq",
    ".hidden vmferry_boot_end",
    ".globl vmferry_boot_end",
    "vmferry_boot_end:",
    ".popsection",
    counter = const COUNTER_GPA,
    words = const BOOT_WORDS_GPA,
    gdt = const GDT_GPA,
    gdt_limit = const descriptors_limit_of_all(),
    idt = const IDT_GPA,
    idt_limit = const GATES_LIMIT,
    cr0 = const CR0 as i32,
    cr4 = const CR4,
    efer = const EFER,
    page_tables = const PAGE_TABLES_GPA,
    page = const PAGE_SIZE,
    kernel_code = const KERNEL_CODE,
    kernel_data = const KERNEL_DATA,
    user_code = const USER_CODE,
    user_data = const USER_DATA,
    first_tss = const FIRST_TSS,
    kernel_stacks = const KERNEL_STACKS_GPA,
    user_stacks = const USER_STACKS_GPA,
    blocks = const VCPU_BLOCKS_GPA,
    config = const CONFIG_GPA,
    clock = const CLOCK_GPA,
    timer_vector = const TIMER_VECTOR,
    ap_vector = const AP_VECTOR,
    options(att_syntax)
);

/// The table's limit for the most processors: those that are not there have empty descriptors.
const fn descriptors_limit_of_all() -> u16 {
    FIRST_TSS + 16 * MAX_VCPUS as u16 - 1
}

unsafe extern "C" {
    static vmferry_boot_start: u8;
    static vmferry_boot_end: u8;
}

/// The firmware, for QEMU's `-bios`.
pub fn rom() -> Vec<u8> {
    let start = &raw const vmferry_boot_start;
    let length = (&raw const vmferry_boot_end).addr() - start.addr();
    let mut bytes = vec![0; ROM_BYTES];
    // SAFETY: start and end are symbols of the one section written above; nothing changes it.
    bytes[..length].copy_from_slice(unsafe { std::slice::from_raw_parts(start, length) });
    // ljmp segment:0
    let [low, high] = ROM_SEGMENT.to_le_bytes();
    for offset in [AP_OFFSET, RESET_OFFSET] {
        bytes[offset..offset + 5].copy_from_slice(&[0xea, 0, 0, low, high]);
    }
    bytes
}

#[cfg(test)]
mod tests;
