use super::*;
use crate::machine::Workload;

#[test]
fn nothing_lies_in_the_hole_of_a_pc() {
    let config = GuestConfig { vcpus: 2, workload: Workload::Random, write_percent: 20, seed: 1 };
    let parts = loaded(512 << 20, &config, 2_000_000);
    let extents: Vec<_> = parts.iter().map(|part| (part.gpa, part.gpa + part.bytes.len() as u64)).collect();
    assert!(matches!(extents[..], [(BOOT_WORDS_GPA, a), (b, _)] if a <= LOW_END && b >= HIGH_START), "{extents:x?}");
}
