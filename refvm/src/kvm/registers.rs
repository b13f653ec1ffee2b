//! The registers with which a vCPU of our guest begins: straight into 64-bit mode.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::guest::image::{
    FIRST_TSS, GATES_LIMIT, KERNEL_CODE, KERNEL_DATA, TSS_LIMIT, USER_CODE, USER_DATA, descriptors_limit,
};
use crate::guest::payload::payload;
use crate::guest::{
    CODE_GPA, CONFIG_GPA, FIRST_EPOCH, GDT_GPA, IDT_GPA, PAGE_SIZE, PAGE_TABLES_GPA, TSS_GPA, TSS_STRIDE,
    USER_STACKS_GPA, VCPU_BLOCKS_GPA,
};

/// PE, MP, ET, NE, WP, AM, PG.
const CR0: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 18 | 1 << 31;
/// PAE, MCE, OSFXSR, OSXMMEXCPT. Without MCE a machine check is a shutdown.
const CR4: u64 = 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10;
/// LME, LMA, NXE.
const EFER: u64 = 1 << 8 | 1 << 10 | 1 << 11;

/// The ring of the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ring {
    /// Ring 0: only to make KVM emulate its accesses, on hosts that emulate ring 0.
    Kernel,
    /// Ring 3.
    User,
}

/// Special registers; `reset` has the values after the vCPU's creation.
pub fn special(reset: kvm_sregs, vcpu: u32, vcpus: u32, ring: Ring) -> kvm_sregs {
    let (code, data) = match ring {
        Ring::Kernel => (KERNEL_CODE, KERNEL_DATA),
        Ring::User => (USER_CODE, USER_DATA),
    };
    let data = segment(data, 0x3);
    kvm_sregs {
        cs: kvm_segment { l: 1, db: 0, ..segment(code, 0xb) },
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task(vcpu),
        ldt: kvm_segment { unusable: 1, ..Default::default() },
        gdt: kvm_dtable { base: GDT_GPA, limit: descriptors_limit(vcpus), ..Default::default() },
        idt: kvm_dtable { base: IDT_GPA, limit: GATES_LIMIT, ..Default::default() },
        cr0: CR0,
        cr3: PAGE_TABLES_GPA,
        cr4: CR4,
        efer: EFER,
        ..reset
    }
}

fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: (selector & 3) as u8,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    }
}

fn task(vcpu: u32) -> kvm_segment {
    kvm_segment {
        base: TSS_GPA + u64::from(vcpu) * TSS_STRIDE,
        limit: TSS_LIMIT,
        selector: FIRST_TSS + 16 * vcpu as u16,
        type_: 0xb,
        present: 1,
        ..Default::default()
    }
}

/// General registers.
pub fn general(vcpu: u32) -> kvm_regs {
    let vcpu = u64::from(vcpu);
    kvm_regs {
        rip: CODE_GPA + payload().entry,
        rsp: USER_STACKS_GPA + (vcpu + 1) * PAGE_SIZE,
        rflags: 2,
        r13: CONFIG_GPA,
        r14: FIRST_EPOCH,
        r15: VCPU_BLOCKS_GPA + vcpu * PAGE_SIZE,
        ..Default::default()
    }
}
