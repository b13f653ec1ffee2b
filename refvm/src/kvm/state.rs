//! The state of vCPUs and VM: read from and written to KVM, and its form as bytes.
//!
//! JSON, so that a state can be looked at; versioned. Order of the restore as KVM asks for it: special registers
//! (they decide the mode) before MSRs, events last.

use std::io;

use kvm_bindings::{
    Msrs, kvm_clock_data, kvm_debugregs, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::first_pages::FirstPages;
use super::machine_check::Told;
use crate::guest::payload::{MCE_BANK, MSR_MCG_STATUS};
use crate::machine::{Block, GuestConfig, MachineError, MappedRegion};

const FORMAT: &str = "vmferry-refvm/kvm";
const VERSION: u32 = 2;

/// Most MSRs in a call (`MAX_IO_MSRS` in arch/x86/kvm/x86.c).
const MOST_MSRS: usize = 256;

/// MSRs that KVM lists but that need not be settable, with their names. `0x4b564d06`: whether the guest allows live
/// migration, a matter of encrypted guests.
const NOT_SETTABLE: [(u32, &str); 1] = [(0x4b56_4d06, "MSR_KVM_MIGRATION_CONTROL")];

/// All of a guest but its memory.
#[derive(Serialize, Deserialize)]
pub struct GuestState {
    format: String,
    version: u32,
    /// The guest's workload.
    pub config: GuestConfig,
    /// GPA and size of each region.
    regions: Vec<(u64, u64)>,
    /// The VM's clock.
    pub clock: kvm_clock_data,
    /// The errors that the guest knows.
    pub told: Told,
    /// In order.
    pub vcpus: Vec<VcpuState>,
}

/// A vCPU.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    /// General registers.
    pub regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    msrs: Vec<(u32, u64)>,
    tsc_khz: u32,
    /// AO machine checks that wait for their turn.
    pub waiting: Vec<Block>,
}

impl VcpuState {
    /// Its first pages, if they are known.
    pub fn first_pages(&self) -> Option<FirstPages> {
        FirstPages::of(&self.regs, &self.sregs)
    }
}

fn other_format(format: &str, version: u32) -> Option<String> {
    if format != FORMAT {
        return Some(format!("format is {format:?}, must be {FORMAT:?}"));
    }
    (version != VERSION).then(|| format!("version is {version}, must be {VERSION}"))
}

/// Why a state that cannot be read is none of ours, if it says so itself.
fn not_ours(bytes: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Head {
        format: String,
        version: u32,
    }
    let head: Head = serde_json::from_slice(bytes).ok()?;
    other_format(&head.format, head.version)
}

fn layout(regions: &[MappedRegion]) -> Vec<(u64, u64)> {
    regions.iter().map(|region| (region.gpa, region.size)).collect()
}

impl GuestState {
    /// Puts the parts together.
    pub fn new(
        config: GuestConfig,
        regions: &[MappedRegion],
        clock: kvm_clock_data,
        told: Told,
        vcpus: Vec<VcpuState>,
    ) -> Self {
        Self { format: FORMAT.into(), version: VERSION, config, regions: layout(regions), clock, told, vcpus }
    }

    /// As bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>, MachineError> {
        serde_json::to_vec(self).map_err(|error| MachineError::BadState(error.to_string()))
    }

    /// From bytes, for a machine of so many vCPUs over these regions.
    pub fn from_bytes(bytes: &[u8], regions: &[MappedRegion], vcpus: u32) -> Result<Self, MachineError> {
        let bad = |text: String| Err(MachineError::BadState(text));
        let state: Self = match serde_json::from_slice(bytes) {
            Ok(state) => state,
            Err(error) => return bad(not_ours(bytes).unwrap_or_else(|| error.to_string())),
        };
        if let Some(text) = other_format(&state.format, state.version) {
            return bad(text);
        }
        let counts = [state.config.vcpus as usize, state.vcpus.len()];
        if counts.iter().any(|count| *count != vcpus as usize) {
            return bad(format!("vcpus: configured {}, saved {}, must be {vcpus}", counts[0], counts[1]));
        }
        if state.regions != layout(regions) {
            return bad(format!("regions (gpa, size) are {:x?}, must be {:x?}", state.regions, layout(regions)));
        }
        Ok(state)
    }
}

/// Indices of the MSRs to be saved: those that KVM lists, and the machine-check banks, which it does not.
pub fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>, MachineError> {
    let listed = kvm.get_msr_index_list().map_err(|error| host("KVM_GET_MSR_INDEX_LIST", error))?;
    let mut indices = listed.as_slice().to_vec();
    indices.extend([MSR_MCG_STATUS, MSR_MCG_STATUS + 1]);
    indices.extend(0x400..0x400 + 4 * (MCE_BANK + 1));
    indices.sort_unstable();
    indices.dedup();
    Ok(indices)
}

/// A KVM error with the name of its call.
pub fn host(what: &'static str, error: kvm_ioctls::Error) -> MachineError {
    MachineError::Host { what, source: io::Error::from_raw_os_error(error.errno()) }
}

/// Reads an MSR; none if KVM does not let us.
pub fn read_msr(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    (vcpu.get_msrs(&mut msrs).ok()? == 1).then(|| msrs.as_slice()[0].data)
}

/// Reads MSRs with as few calls as KVM allows; those that it does not let us read are left out.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, MachineError> {
    let wanted: Vec<_> = indices.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
    let (mut found, mut rest) = (Vec::with_capacity(wanted.len()), wanted.as_slice());
    while !rest.is_empty() {
        let mut msrs = entries(rest)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(|e| host("KVM_GET_MSRS", e))?;
        found.extend(msrs.as_slice()[..read].iter().map(|entry| (entry.index, entry.data)));
        rest = rest.get(read + usize::from(read < msrs.as_slice().len())..).unwrap_or_default();
    }
    Ok(found)
}

/// As a call takes them: KVM stops at the first that it refuses.
fn entries(entries: &[kvm_msr_entry]) -> Result<Msrs, MachineError> {
    let some = &entries[..entries.len().min(MOST_MSRS)];
    Msrs::from_entries(some).map_err(|error| MachineError::BadState(format!("MSRs: {error:?}")))
}

/// Reads a stopped vCPU with nothing pending in KVM.
pub fn save_vcpu(vcpu: &VcpuFd, indices: &[u32], waiting: Vec<Block>) -> Result<VcpuState, MachineError> {
    Ok(VcpuState {
        // First: KVM_GET_MP_STATE may finish work that changes the others.
        mp_state: vcpu.get_mp_state().map_err(|e| host("KVM_GET_MP_STATE", e))?,
        regs: vcpu.get_regs().map_err(|e| host("KVM_GET_REGS", e))?,
        sregs: vcpu.get_sregs().map_err(|e| host("KVM_GET_SREGS", e))?,
        xsave: vcpu.get_xsave().map_err(|e| host("KVM_GET_XSAVE", e))?,
        xcrs: vcpu.get_xcrs().map_err(|e| host("KVM_GET_XCRS", e))?,
        debugregs: vcpu.get_debug_regs().map_err(|e| host("KVM_GET_DEBUGREGS", e))?,
        events: vcpu.get_vcpu_events().map_err(|e| host("KVM_GET_VCPU_EVENTS", e))?,
        msrs: read_msrs(vcpu, indices)?,
        tsc_khz: vcpu.get_tsc_khz().map_err(|e| host("KVM_GET_TSC_KHZ", e))?,
        waiting,
    })
}

/// Writes a vCPU that never ran.
pub fn load_vcpu(vcpu: &VcpuFd, state: &VcpuState) -> Result<(), MachineError> {
    let refused = |what: &str, e: kvm_ioctls::Error| MachineError::BadState(format!("{what} refused: {e}"));
    if let Err(error) = vcpu.set_tsc_khz(state.tsc_khz) {
        // The guest continues with the host's frequency; it measures latency with it and nothing else.
        tracing::warn!(khz = state.tsc_khz, %error, "kvm.tsc_frequency_not_kept");
    }
    vcpu.set_sregs(&state.sregs).map_err(|e| refused("KVM_SET_SREGS", e))?;
    vcpu.set_xcrs(&state.xcrs).map_err(|e| refused("KVM_SET_XCRS", e))?;
    // SAFETY: without dynamically enabled features (none are asked for) the state is the 4096 bytes of kvm_xsave.
    unsafe { vcpu.set_xsave(&state.xsave) }.map_err(|e| refused("KVM_SET_XSAVE", e))?;
    load_msrs(vcpu, &state.msrs)?;
    vcpu.set_regs(&state.regs).map_err(|e| refused("KVM_SET_REGS", e))?;
    vcpu.set_debug_regs(&state.debugregs).map_err(|e| refused("KVM_SET_DEBUGREGS", e))?;
    vcpu.set_mp_state(state.mp_state).map_err(|e| refused("KVM_SET_MP_STATE", e))?;
    vcpu.set_vcpu_events(&state.events).map_err(|e| refused("KVM_SET_VCPU_EVENTS", e))
}

/// An MSR that cannot be set is tolerated if it has the value already, or is known by name.
fn load_msrs(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), MachineError> {
    let wanted: Vec<_> =
        msrs.iter().map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() }).collect();
    let mut rest = wanted.as_slice();
    while !rest.is_empty() {
        let asked = entries(rest)?;
        let set = vcpu.set_msrs(&asked).map_err(|e| host("KVM_SET_MSRS", e))?;
        if set < asked.as_slice().len() {
            tolerate(vcpu, &rest[set])?;
        }
        rest = rest.get(set + usize::from(set < asked.as_slice().len())..).unwrap_or_default();
    }
    Ok(())
}

fn tolerate(vcpu: &VcpuFd, refused: &kvm_msr_entry) -> Result<(), MachineError> {
    let kvm_msr_entry { index, data, .. } = *refused;
    if read_msr(vcpu, index) == Some(data) {
        return Ok(());
    }
    let Some((_, name)) = NOT_SETTABLE.iter().find(|(known, _)| *known == index) else {
        return Err(MachineError::BadState(format!("MSR {index:#x} refused the value {data:#x}")));
    };
    tracing::info!(msr = *name, value = data, "kvm.msr_not_kept");
    Ok(())
}
