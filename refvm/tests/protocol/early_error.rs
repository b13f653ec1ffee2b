//! The host finds a bad frame before a thread touches it: the daemon hears of it, and the guest takes an AO machine check.

use std::io;
use std::mem::MaybeUninit;
use std::path::Path;
use std::process::Child;
use std::ptr::null_mut;

use serde_json::{Value, json};
use tempfile::tempdir;

use crate::stand_in::Vmm;

/// `si_code` of an error found early (linux/siginfo.h).
const BUS_MCEERR_AO: i32 = 5;
/// Fails the frame with the number that is written to it, as hardware's report would (Documentation/mm/hwpoison.rst).
const CORRUPT_PFN: &str = "/sys/kernel/debug/hwpoison/corrupt-pfn";
const BAD_GPA: u64 = (20 << 20) + 5 * 4096;

fn need(what: &str, result: i64) {
    assert!(result >= 0, "{what}: {}", io::Error::last_os_error());
}

/// Stops the main thread as SIGBUS comes to it, and makes of that what the kernel sends for an early error at `hva`.
fn signal_early_error(child: &Child, hva: u64) {
    let pid = child.id() as libc::pid_t;
    let wait = || {
        let mut status = 0;
        // SAFETY: the status is a live integer.
        need("waitpid", unsafe { libc::waitpid(pid, &mut status, libc::__WALL) }.into());
        status
    };
    // SAFETY: numbers, but for the siginfo, which is live and of the type that the kernel fills.
    unsafe {
        need("PTRACE_SEIZE", libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0));
        need("tgkill", libc::syscall(libc::SYS_tgkill, pid, pid, libc::SIGBUS));
        assert_eq!(wait() >> 8, libc::SIGBUS);
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        need("PTRACE_GETSIGINFO", libc::ptrace(libc::PTRACE_GETSIGINFO, pid, 0, info.as_mut_ptr()));
        let words = info.as_mut_ptr().cast::<u64>();
        info.as_mut_ptr().cast::<i32>().add(2).write(BUS_MCEERR_AO);
        words.add(2).write(hva);
        words.add(3).write(12); // si_addr_lsb
        need("PTRACE_SETSIGINFO", libc::ptrace(libc::PTRACE_SETSIGINFO, pid, 0, info.as_mut_ptr()));
        need("PTRACE_DETACH", libc::ptrace(libc::PTRACE_DETACH, pid, null_mut::<u8>(), libc::SIGBUS as usize));
    }
}

/// Has the host fail the frame that a process has there.
fn fail_frame(child: &Child, hva: u64) {
    use std::os::unix::fs::FileExt;
    let mut word = [0; 8];
    let pagemap = std::fs::File::open(format!("/proc/{}/pagemap", child.id())).unwrap();
    pagemap.read_exact_at(&mut word, hva / 4096 * 8).unwrap();
    let word = u64::from_ne_bytes(word);
    assert!(word >> 63 == 1, "the page is not present: {word:#x}");
    std::fs::write(CORRUPT_PFN, format!("{:#x}\n", word & ((1 << 55) - 1))).unwrap();
}

fn hva_of(vmm: &Vmm, gpa: u64) -> u64 {
    let status = vmm.admin(&json!({"cmd": "status"}));
    status["regions"][0]["hva"].as_u64().unwrap() + gpa
}

/// Told twice: at once, and when the guest has taken the machine check. A guest that is stopped takes it later.
fn told_and_taken(vmm: &mut Vmm) {
    vmm.told_until(1);
    let told = |error: &Value| {
        let field = |name: &str| error[name].clone();
        (field("gpa"), field("lsb"), field("severity"), field("guest_visible"))
    };
    assert_eq!(told(&vmm.told[0]), (json!(BAD_GPA), json!(12), json!(null), json!(false)));
    assert_eq!(vmm.report()["machine_checks"], json!([]));
    vmm.done(json!({"type": "resume"}));
    vmm.told_until(2);
    assert_eq!(told(&vmm.told[1]), (json!(BAD_GPA), json!(12), json!("AO"), json!(true)));
    let report = vmm.report_until("the machine check", |report| report["machine_checks"] != json!([]));
    let check = &report["machine_checks"][0];
    assert_eq!((&check["gpa"], &check["severity"]), (&json!(BAD_GPA), &json!("AO")));
    assert_eq!(report["wrong_bytes"], 0);
}

fn for_each_guest(make_bad: fn(&Child, u64)) {
    for accel in ["kvm", "process"] {
        if accel == "kvm" && !Path::new("/dev/kvm").exists() {
            println!("SKIPPED: {accel}: no /dev/kvm");
            continue;
        }
        for backing in ["anonymous", "memfd"] {
            let dir = tempdir().unwrap();
            let options = ["--memory", "32M", "--workload", "sequential", "--backing", backing];
            let mut vmm = Vmm::start_with(accel, dir.path(), "a", &options);
            vmm.done(json!({"type": "stop"}));
            make_bad(&vmm.child, hva_of(&vmm, BAD_GPA));
            told_and_taken(&mut vmm);
            // No guest memory there: it lives on, and tells nothing.
            signal_early_error(&vmm.child, 0x1000);
            vmm.done(json!({"type": "stop"}));
            assert_eq!(vmm.told.len(), 2, "{:?}", vmm.told);
        }
    }
}

#[test]
fn an_early_error_is_told_at_once_and_taken_by_the_guest() {
    for_each_guest(signal_early_error);
}

#[test]
fn an_early_error_of_a_real_frame_is_told_at_once_and_taken_by_the_guest() {
    if !Path::new(CORRUPT_PFN).exists() {
        return println!("SKIPPED: {CORRUPT_PFN} is missing: root, CONFIG_MEMORY_FAILURE, modprobe hwpoison_inject");
    }
    for_each_guest(fail_frame);
}
