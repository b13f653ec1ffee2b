//! State saved in one machine and loaded into another.

use serde_json::Value;
use vmferry_refvm::kvm::Ring;
use vmferry_refvm::machine::{Block, Machine, MachineError, Workload};
use vmferry_refvm::memory::GuestMemory;

use crate::support::{FIRST, Guest, PAGE, booted, checks, config, memory, over};

/// The memory of a stopped guest, once more.
fn copied(guest: &Guest) -> GuestMemory {
    let copy = GuestMemory::new(&guest.memory.specs()).unwrap();
    for (from, to) in guest.memory.regions().iter().zip(copy.regions()) {
        // SAFETY: two mappings of that size; the guest is stopped.
        unsafe {
            std::ptr::copy_nonoverlapping(from.hva as *const u8, to.hva as *mut u8, from.spec.size as usize);
        }
    }
    copy
}

/// Another machine over a copy of the memory.
fn moved(guest: &mut Guest, vcpus: u32) -> Guest {
    let state = guest.save().unwrap();
    let copy = copied(guest);
    // The workload comes with the state.
    let mut other = over(copy, config(vcpus, Workload::Idle, 0), Ring::User);
    other.load(&state).unwrap();
    other
}

#[test]
fn a_guest_continues_in_another_machine_over_a_copy_of_its_memory() {
    for (vcpus, workload) in
        [(1, Workload::Sequential), (2, Workload::Random), (4, Workload::Hot), (2, Workload::Paced)]
    {
        let Some(mut guest) = booted(20, 2, config(vcpus, workload, 50), Ring::User) else { return };
        guest.run().unwrap();
        guest.until("touches", |report| report.touches > 300);
        guest.stop().unwrap();
        let before = guest.report();
        let mut other = moved(&mut guest, vcpus);
        other.run().unwrap();
        other.until("more touches", |report| report.touches > before.touches + 300);
        other.stop().unwrap();
        let report = other.report();
        assert_eq!((report.wrong_bytes, report.machine_checks.len()), (0, 0), "{report:?}");
        // The histogram is that of the new host.
        let (count, most) = (report.first_touch_us.count, report.touches - before.touches + u64::from(vcpus));
        assert!(count > 0 && count <= most, "{report:?}");
        assert_eq!(guest.report(), before, "the first machine has touched nothing since");
    }
}

#[test]
fn a_guest_moves_many_times_over_the_same_memory() {
    let Some(mut guest) = booted(20, 1, config(2, Workload::Random, 50), Ring::User) else { return };
    let mut machine = None::<Guest>;
    for _ in 0..20 {
        let current = machine.as_mut().unwrap_or(&mut guest);
        current.run().unwrap();
        let before = current.report().touches;
        current.until("more touches", |report| report.touches > before + 50);
        current.stop().unwrap();
        machine = Some(moved(current, 2));
    }
    let mut last = machine.unwrap();
    last.run().unwrap();
    assert_eq!(last.passes(1).wrong_bytes, 0);
}

#[test]
fn a_byte_lost_on_the_way_is_found() {
    let Some(mut guest) = booted(20, 1, config(2, Workload::Sequential, 50), Ring::User) else { return };
    guest.run().unwrap();
    guest.passes(1);
    guest.stop().unwrap();
    let mut other = moved(&mut guest, 2);
    other.flip_byte(FIRST + 99 * PAGE + 4000);
    other.run().unwrap();
    // The pass that was under way may have been past that page already.
    let report = other.until("the byte to be found", |report| report.wrong_bytes > 0);
    assert_eq!((report.wrong_bytes, report.wrong_pages), (1, vec![FIRST + 99 * PAGE]));
}

#[test]
fn machine_checks_travel_told_or_not_yet_taken() {
    let Some(mut guest) = booted(20, 1, config(2, Workload::Sequential, 50), Ring::User) else { return };
    let (consumed, found) = (FIRST + 3 * PAGE, FIRST + 600 * PAGE);
    guest.poison(consumed);
    guest.run().unwrap();
    guest.until("the first machine check", |report| report.machine_checks.len() == 1);
    guest.stop().unwrap();
    // Several, so that one is taken at a time and the others wait with the state.
    let waiting: Vec<u64> = (0..5).map(|n| found + n * PAGE).collect();
    for gpa in &waiting {
        guest.inject_action_optional(Block::page(*gpa)).unwrap();
    }
    let state = guest.save().unwrap();
    let memory = std::mem::replace(&mut guest.memory, memory(20, 1));
    let mut other = over(memory, config(2, Workload::Idle, 0), Ring::User);
    other.load(&state).unwrap();
    other.inject_action_optional(Block::page(consumed)).unwrap();
    other.inject_action_optional(Block::page(found)).unwrap();
    other.run().unwrap();
    other.until("6 machine checks", |report| report.machine_checks.len() >= 6);
    let report = other.passes(2);
    let mut expected = vec![(consumed, "AR")];
    expected.extend(waiting.iter().map(|gpa| (*gpa, "AO")));
    assert_eq!(checks(&report), expected);
    assert_eq!(report.wrong_bytes, 0);
    drop(other);
}

#[test]
fn a_state_that_does_not_fit_is_refused_by_name() {
    let Some(mut guest) = booted(20, 1, config(2, Workload::Random, 50), Ring::User) else { return };
    let state = guest.save().unwrap();
    let change = |edit: &dyn Fn(&mut Value)| {
        let mut value: Value = serde_json::from_slice(&state).unwrap();
        edit(&mut value);
        serde_json::to_vec(&value).unwrap()
    };
    let wrong: [(Vec<u8>, &str); 7] = [
        (b"nonsense".to_vec(), "expected"),
        (change(&|v| v["format"] = "other".into()), "format"),
        (change(&|v| v["version"] = 1.into()), "version"),
        (change(&|v| v["regions"][0][1] = 4096.into()), "regions"),
        (change(&|v| drop(v["vcpus"].as_array_mut().unwrap().pop())), "vcpus"),
        (change(&|v| v["vcpus"][1]["regs"] = Value::Null), "null"),
        (change(&|v| v["vcpus"][1]["msrs"] = serde_json::json!([[0xdead_beef_u32, 1]])), "MSR 0xdeadbeef"),
    ];
    for (bytes, name) in wrong {
        let memory = memory(20, 1);
        let error = over(memory, config(2, Workload::Random, 0), Ring::User).load(&bytes).unwrap_err();
        assert!(matches!(&error, MachineError::BadState(text) if text.contains(name)), "{name}: {error}");
    }
}

#[test]
fn commands_out_of_turn_are_refused() {
    let Some(mut guest) = booted(20, 1, config(1, Workload::Random, 50), Ring::User) else { return };
    let state = guest.save().unwrap();
    assert!(matches!(guest.load(&state), Err(MachineError::WrongState { actual: "stopped", required: "new" })));
    assert!(matches!(guest.boot(), Err(MachineError::WrongState { actual: "stopped", required: "new" })));
    guest.run().unwrap();
    assert!(matches!(guest.save(), Err(MachineError::WrongState { actual: "running", required: "stopped" })));
    assert!(guest.inject_action_optional(Block::page(1 << 40)).is_err());
}

/// On a destination known poison is marked, and told, before the state is there.
#[test]
fn an_error_found_before_the_state_is_loaded_is_injected_after_it() {
    let Some(mut guest) = booted(20, 1, config(2, Workload::Idle, 0), Ring::User) else { return };
    guest.run().unwrap();
    guest.until("its first pass", |report| report.passes > 0);
    guest.stop().unwrap();
    let state = guest.save().unwrap();
    let copy = copied(&guest);
    let mut other = over(copy, config(2, Workload::Idle, 0), Ring::User);
    let bad = FIRST + 7 * PAGE;
    for _ in 0..2 {
        other.inject_action_optional(Block::page(bad)).unwrap();
    }
    other.load(&state).unwrap();
    other.run().unwrap();
    let report = other.until("the machine check", |report| !report.machine_checks.is_empty());
    assert_eq!(checks(&report), [(bad, "AO")]);
}
