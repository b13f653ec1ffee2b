//! What a machine check looks like to the guest, and what it has been told already.
//!
//! The values are QEMU's (target/i386/kvm/kvm.c, `kvm_mce_inject`): bank 9, addresses of a whole page.

use std::collections::BTreeSet;

use kvm_bindings::kvm_x86_mce;

use crate::guest::payload::MCE_BANK;

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
/// Address mode physical (2), least significant bit of the address 12.
const MISC: u64 = (2 << 6) | 12;

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
pub fn machine_check(gpa: u64, severity: Severity) -> kvm_x86_mce {
    let common = VALID | UNCORRECTED | ENABLED | MISC_VALID | ADDRESS_VALID | SIGNALED;
    let (status, mcg_status) = match severity {
        Severity::Required => (ACTION_REQUIRED | DATA_LOAD, RESTART_VALID | ERROR_IP_VALID),
        Severity::Optional => (SCRUBBING, RESTART_VALID),
    };
    kvm_x86_mce {
        status: common | status,
        addr: gpa,
        misc: MISC,
        mcg_status: mcg_status | IN_PROGRESS,
        bank: MCE_BANK as u8,
        ..Default::default()
    }
}

/// Pages of which the guest has been told; travels with the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Told {
    required: BTreeSet<u64>,
    optional: BTreeSet<u64>,
    announced: BTreeSet<u64>,
}

impl Told {
    /// A vCPU consumed the error: always told, and an AO that is still on its way is then superfluous.
    pub fn consumed(&mut self, gpa: u64) {
        self.required.insert(gpa);
    }

    /// The error was found early. True: the guest is to be told; false: it knows.
    pub fn found(&mut self, gpa: u64) -> bool {
        !self.required.contains(&gpa) && self.optional.insert(gpa)
    }

    /// Whether an AO that waits for its turn is superfluous by now.
    pub fn is_superfluous(&self, gpa: u64) -> bool {
        self.required.contains(&gpa)
    }

    /// A vCPU takes the AO. True for the first of them.
    pub fn announce(&mut self, gpa: u64) -> bool {
        self.announced.insert(gpa)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_early_error_is_told_once_and_not_after_its_consumption() {
        let mut told = Told::default();
        assert!(told.found(0x1000));
        assert!(!told.found(0x1000));
        told.consumed(0x2000);
        assert!(!told.found(0x2000) && told.is_superfluous(0x2000) && !told.is_superfluous(0x1000));
        assert!(told.announce(0x1000) && !told.announce(0x1000));
    }

    #[test]
    fn the_status_words_are_those_of_qemu() {
        let (required, optional) =
            (machine_check(0x5000, Severity::Required), machine_check(0x5000, Severity::Optional));
        assert_eq!((required.status, required.mcg_status), (0xbd80_0000_0000_0134, 7));
        assert_eq!((optional.status, optional.mcg_status), (0xbd00_0000_0000_00c0, 5));
        assert_eq!((required.misc, required.addr, required.bank), (0x8c, 0x5000, 9));
    }
}
