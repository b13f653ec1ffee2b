//! The form of a machine check for the guest, and the record of those that it has had.
//!
//! The values are QEMU's (target/i386/kvm/kvm.c, `kvm_mce_inject`): bank 9, and addresses of a whole page. Here the page may
//! be a huge one, and the least significant bit of the address says so.

use std::collections::BTreeSet;

use kvm_bindings::kvm_x86_mce;

use crate::guest::payload::MCE_BANK;
use crate::machine::{Block, LSB_1G};

const VALID: u64 = 1 << 63;
const UNCORRECTED: u64 = 1 << 61;
const ENABLED: u64 = 1 << 60;
const MISC_VALID: u64 = 1 << 59;
const ADDRESS_VALID: u64 = 1 << 58;
const SIGNALED: u64 = 1 << 56;
const ACTION_REQUIRED: u64 = 1 << 55;
/// MCA code "data load, level 0" (SDM vol. 3, 17.9.2).
const DATA_LOAD: u64 = 0x134;
/// MCA code "memory scrubbing".
const SCRUBBING: u64 = 0xc0;
/// Address mode physical, above the least significant bit of the address (SDM vol. 3, 17.3.2.4).
const PHYSICAL: u64 = 2 << 6;

/// `IA32_MCG_STATUS`: the instruction pointer is that of the interrupted instruction.
const RESTART_VALID: u64 = 1;
/// `IA32_MCG_STATUS`: and that instruction caused the error.
const ERROR_IP_VALID: u64 = 1 << 1;
/// `IA32_MCG_STATUS`: a machine check is being handled; another one now is a shutdown.
pub const IN_PROGRESS: u64 = 1 << 2;

/// `IA32_MCG_CAP`: banks, `MCG_CTL_P` and `MCG_SER_P` (software error recovery: without it there is no AO or AR).
pub const CAPABILITIES: u64 = (MCE_BANK as u64 + 1) | 1 << 8 | 1 << 24;

/// How urgent an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// AR: the vCPU consumed it.
    Required,
    /// AO: it was found before anybody consumed it.
    Optional,
}

/// The machine check for a page, as `KVM_X86_SET_MCE` wants it.
pub fn machine_check(block: Block, severity: Severity) -> kvm_x86_mce {
    let common = VALID | UNCORRECTED | ENABLED | MISC_VALID | ADDRESS_VALID | SIGNALED;
    let (status, mcg_status) = match severity {
        Severity::Required => (ACTION_REQUIRED | DATA_LOAD, RESTART_VALID | ERROR_IP_VALID),
        Severity::Optional => (SCRUBBING, RESTART_VALID),
    };
    kvm_x86_mce {
        status: common | status,
        addr: block.gpa,
        misc: PHYSICAL | u64::from(block.lsb),
        mcg_status: mcg_status | IN_PROGRESS,
        bank: MCE_BANK as u8,
        ..Default::default()
    }
}

/// Bad pages that the guest knows; travels with the guest, also to a host with another page size.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Told {
    required: BTreeSet<Block>,
    optional: BTreeSet<Block>,
    announced: BTreeSet<Block>,
}

/// Whether a block lies in one of these.
fn covered(by: &BTreeSet<Block>, block: Block) -> bool {
    (block.lsb..=LSB_1G).any(|lsb| by.contains(&Block::around(block.gpa, lsb)))
}

impl Told {
    /// A vCPU consumed the error: always told, and an AO that is still on its way is then superfluous.
    pub fn consumed(&mut self, block: Block) {
        self.required.insert(block);
    }

    /// The error was found early. True: the guest is to be told; false: it knows.
    pub fn found(&mut self, block: Block) -> bool {
        !self.is_superfluous(block) && !covered(&self.optional, block) && self.optional.insert(block)
    }

    /// Whether an AO that waits for its turn is superfluous by now.
    pub fn is_superfluous(&self, block: Block) -> bool {
        covered(&self.required, block)
    }

    /// A vCPU takes the AO. True for the first of them.
    pub fn announce(&mut self, block: Block) -> bool {
        self.announced.insert(block)
    }
}

#[cfg(test)]
mod tests;
