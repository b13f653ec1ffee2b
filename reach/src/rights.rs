//! The program's capabilities: it keeps those that the request needs, and drops the others for good.
//!
//! | capability | for |
//! |---|---|
//! | `SYS_PTRACE` | each request, where the VMM runs as another user, or is not dumpable |
//! | `DAC_READ_SEARCH` (else `DAC_OVERRIDE`) | `/proc/PID` of another user's process: page tables, descriptors |
//! | `DAC_OVERRIDE` | to open a VMM's memory file that belongs to another user, for the pager or to empty it |
//! | `CHECKPOINT_RESTORE` | memory of a file that the VMM has closed (`/proc/PID/map_files`) |
//! | `SYS_ADMIN` | to read or suspend a seccomp filter; not under `SECCOMP_POLICY_TRUST` |

use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::error::Error;
use crate::proto::reach_request::Operation;
use crate::proto::{Injection, OpenBacking, SeccompPolicy};

/// The capabilities that an operation can use.
#[must_use]
pub fn needed(operation: &Operation) -> CapabilitySet {
    let files = CapabilitySet::DAC_OVERRIDE | CapabilitySet::CHECKPOINT_RESTORE;
    let more = match operation {
        Operation::Describe(describe) if describe.open_backing() == OpenBacking::Unspecified => CapabilitySet::empty(),
        Operation::Describe(_) => files,
        Operation::Empty(empty) => files | for_injection(empty.injection.as_ref()),
        Operation::CreateUserfaultfd(create) => files | for_injection(create.injection.as_ref()),
        Operation::CloseUserfaultfd(close) => for_injection(close.injection.as_ref()),
        Operation::Probe(probe) => for_injection(probe.injection.as_ref()),
        Operation::ReadMemory(_) => CapabilitySet::empty(),
    };
    CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_READ_SEARCH | more
}

fn for_injection(injection: Option<&Injection>) -> CapabilitySet {
    match injection.map_or(SeccompPolicy::Unspecified, Injection::seccomp) {
        SeccompPolicy::Trust => CapabilitySet::empty(),
        SeccompPolicy::Unspecified | SeccompPolicy::Suspend => CapabilitySet::SYS_ADMIN,
    }
}

/// Chooses the needed ones of the permitted capabilities. `DAC_OVERRIDE` includes `DAC_READ_SEARCH`, and stands in for it.
#[must_use]
pub fn kept(permitted: CapabilitySet, needed: CapabilitySet) -> CapabilitySet {
    let reading = CapabilitySet::DAC_READ_SEARCH;
    let kept = permitted & needed;
    if needed.contains(reading) && !permitted.contains(reading) {
        return kept | permitted & CapabilitySet::DAC_OVERRIDE;
    }
    kept
}

/// Drops all capabilities but those for `operation`, and every way to gain others.
///
/// # Errors
/// The kernel refuses.
pub fn drop_others(operation: &Operation) -> Result<(), Error> {
    let drop = || -> rustix::io::Result<()> {
        rustix::thread::set_no_new_privs(true)?;
        rustix::thread::clear_ambient_capability_set()?;
        let kept = kept(rustix::thread::capabilities(None)?.permitted, needed(operation));
        let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
        rustix::thread::set_capabilities(None, sets)
    };
    drop().map_err(|error| Error::System { what: "drop capabilities".into(), source: error.into() })
}

#[cfg(test)]
mod tests;
