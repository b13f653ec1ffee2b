use super::*;
use crate::proto::{DescribeRequest, ProbeRequest, ReadMemoryRequest};

fn probe(seccomp: SeccompPolicy) -> Operation {
    let injection = Injection { excluded_threads: Vec::new(), seccomp: seccomp.into() };
    Operation::Probe(ProbeRequest { injection: Some(injection) })
}

#[test]
fn only_seccomp_needs_the_right_to_administer() {
    let admin = |operation| needed(&operation).contains(CapabilitySet::SYS_ADMIN);
    assert!(admin(probe(SeccompPolicy::Unspecified)));
    assert!(admin(probe(SeccompPolicy::Suspend)));
    assert!(!admin(probe(SeccompPolicy::Trust)));
    assert!(!admin(Operation::Describe(DescribeRequest::default())));
    assert!(!admin(Operation::ReadMemory(ReadMemoryRequest::default())));
}

#[test]
fn the_right_to_write_every_file_is_kept_only_in_place_of_the_right_to_read() {
    let read = needed(&Operation::ReadMemory(ReadMemoryRequest::default()));
    assert_eq!(kept(CapabilitySet::all(), read), CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_READ_SEARCH);
    let unit = CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_OVERRIDE | CapabilitySet::SYS_NICE;
    assert_eq!(kept(unit, read), CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_OVERRIDE);
    assert_eq!(kept(CapabilitySet::empty(), read), CapabilitySet::empty());
}
