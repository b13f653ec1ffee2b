//! Commands of the admin socket.

use std::sync::mpsc::Sender;

use serde_json::{Value, json};

use super::{Event, Flow, Vmm, describe};
use crate::admin::AdminCommand;
use crate::inject::{self, Means};
use crate::layout::Backing;
use crate::machine::{KERNEL_BYTES, MachineError};
use crate::machine_thread::Commanded;
use crate::memory::Region;

impl Vmm {
    pub(super) fn on_admin(&mut self, command: AdminCommand, reply: &Sender<Value>) -> Flow {
        let answer = match command {
            AdminCommand::Quit => {
                drop(reply.send(json!({"ok": true})));
                return Flow::Exit(0);
            }
            AdminCommand::Status => self.status(),
            AdminCommand::Inject { gpa, tell, means } => match self.inject(gpa, tell, means, reply) {
                Ok(()) => return Flow::Continue,
                Err(error) => json!({"ok": false, "error": error}),
            },
        };
        // The client has hung up: nobody to tell.
        drop(reply.send(answer));
        Flow::Continue
    }

    fn status(&self) -> Value {
        let regions: Vec<_> = self.guest.iter().flat_map(|guest| guest.memory.regions()).map(describe).collect();
        json!({"ok": true, "vm": self.options.vm, "state": self.state.name(), "accel": self.options.accel.name(),
               "pid": std::process::id(), "regions": regions,
               "epoch": self.guest.as_ref().and_then(|guest| guest.epoch)})
    }

    fn inject(&self, gpa: u64, tell: bool, means: Means, reply: &Sender<Value>) -> Result<(), String> {
        let guest = self.guest.as_ref().ok_or("there is no guest")?;
        let block = guest.memory.ram().block_at(gpa);
        if block.gpa < KERNEL_BYTES {
            let size = block.size();
            return Err(format!(
                "{gpa:#x} is in a page of {size:#x} of the guest's kernel, which ends at {KERNEL_BYTES:#x}"
            ));
        }
        let holds = |region: &Region| (region.spec.gpa..region.spec.gpa + region.spec.size).contains(&block.gpa);
        let found = guest.memory.regions().iter().enumerate().find(|(_, region)| holds(region));
        let (number, region) = found.ok_or_else(|| format!("{gpa:#x} is not in guest memory"))?;
        let hva = region.hva + (block.gpa - region.spec.gpa);
        let page = inject::Page { block, hva, shared: region.spec.backing == Backing::Memfd };
        let uffd = guest.uffds.get(number).or(guest.uffds.first()).cloned();
        let (events, reply) = (self.events.clone(), reply.clone());
        guest.machine.command(move |commanded: &mut Commanded| {
            let made: Result<(), String> = commanded
                .paused(|| inject::memory_error(page, means, uffd.as_deref()).map_err(|error| error.to_string()))
                .unwrap_or_else(|error: MachineError| Err(error.to_string()));
            let answer = match made {
                Ok(()) => json!({"ok": true}),
                Err(error) => json!({"ok": false, "error": error}),
            };
            if tell && answer["ok"] == true {
                drop(events.send(Event::Injected(block)));
            }
            drop(reply.send(answer));
        });
        Ok(())
    }
}
