//! Memory errors: reports to the daemon, and machine checks for the guest.

use serde_json::{Value, json};

use super::Vmm;
use crate::guest::mapped::gpa_of;
use crate::machine::{Block, GuestMemoryError};
use crate::machine_thread::Commanded;

impl Vmm {
    /// Reports an error for which the guest got a machine check.
    pub(super) fn report_seen(&mut self, error: &GuestMemoryError) {
        let severity = if error.action_required { "AR" } else { "AO" };
        let Block { gpa, lsb } = error.block;
        self.report(json!({"gpa": gpa, "lsb": lsb, "severity": severity, "guest_visible": true,
                           "thread": error.thread}));
    }

    /// Reports an error that the guest has not seen.
    pub(super) fn report_unseen(&mut self, block: Block) {
        let Block { gpa, lsb } = block;
        self.report(json!({"gpa": gpa, "lsb": lsb, "severity": null, "guest_visible": false, "thread": 0}));
    }

    fn report(&mut self, error: Value) {
        tracing::info!(%error, "vmm.memory_error");
        if self.options.mute_errors {
            return;
        }
        let message = self.unrecorded.add(error);
        if self.welcomed {
            self.send(&message);
        }
    }

    /// Reports a bad frame of the host at once. A stopped guest takes its machine check later, if ever.
    pub(super) fn on_found_early(&mut self, hva: u64) {
        let ram = self.guest.as_ref().map(|guest| guest.memory.ram());
        let block = ram.and_then(|ram| gpa_of(&ram.regions, hva).map(|gpa| ram.block_at(gpa)));
        let Some(block) = block else {
            return tracing::warn!(hva = format!("{hva:#x}"), "vmm.memory_error_outside_guest_memory");
        };
        self.report_unseen(block);
        self.inject_action_optional(block, None);
    }

    pub(super) fn on_poisoned(&self, block: Block, waits: Option<u32>) {
        let Block { gpa, lsb } = block;
        tracing::info!(gpa = format!("{gpa:#x}"), lsb, waits, "pager.memory_error");
        self.inject_action_optional(block, waits);
    }

    fn inject_action_optional(&self, block: Block, waits: Option<u32>) {
        let Block { gpa, .. } = block;
        let Some(guest) = &self.guest else { return };
        guest.machine.command(move |commanded: &mut Commanded| {
            let machine = commanded.machine();
            // A vCPU that waits for the page will hit the poison, and gets its machine check then.
            if waits.is_some_and(|thread| !machine.is_helper(thread)) {
                return;
            }
            if let Err(error) = machine.inject_action_optional(block) {
                tracing::error!(%error, gpa = format!("{gpa:#x}"), "machine.inject_failed");
            }
        });
    }
}
