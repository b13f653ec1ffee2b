//! A guest that is served from a copy at hand finds all of its memory as it left it.

#![allow(clippy::unwrap_used)]

use std::process::Command;

use kvm_ioctls::Kvm;
use vmferry_refvm::userfaultfd::{FEATURE_MINOR_SHMEM, Userfaultfd};

#[test]
fn a_guest_that_is_served_at_once_finds_its_memory_as_it_left_it() {
    if let Err(error) = Kvm::new() {
        return println!("SKIPPED: /dev/kvm: {error}");
    }
    if let Err(error) = Userfaultfd::new(FEATURE_MINOR_SHMEM) {
        return println!("SKIPPED: userfaultfd: {error}");
    }
    let guest = ["--memory-mib", "64", "--vcpus", "1", "--workload", "random", "--write-percent", "20", "--seed", "1"];
    for (backing, push_mib_s) in [("memfd", "0"), ("anonymous", "0"), ("memfd", "256")] {
        let run = Command::new(env!("CARGO_BIN_EXE_vmferry-bench-native"))
            .args(["bound", "--backing", backing, "--push-mib-s", push_mib_s])
            .args(guest)
            .output()
            .unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let said: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
        assert_eq!(said["bytes"], 64 << 20);
        assert!(said["seconds"].as_f64().unwrap() > if push_mib_s == "0" { 0.0 } else { 0.2 });
        assert!(said["machinery_cpu_s"].as_f64().unwrap() > 0.0);
        let report = &said["report"];
        assert_eq!((&report["wrong_bytes"], &report["fatal"]), (&0.into(), &serde_json::Value::Null), "{backing}");
        assert!(
            report["touches"].as_u64().unwrap() > 0 && !report["first_touch_buckets"].as_array().unwrap().is_empty()
        );
    }
}
