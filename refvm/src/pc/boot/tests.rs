use super::*;
use crate::guest::image::descriptors_limit;

#[test]
fn both_ways_in_are_within_the_firmware_and_behind_its_code() {
    let rom = rom();
    assert_eq!(rom.len(), ROM_BYTES);
    assert!(rom[AP_OFFSET - 0x1000..AP_OFFSET].iter().all(|byte| *byte == 0));
    assert_eq!(rom[RESET_OFFSET..RESET_OFFSET + 5], [0xea, 0, 0, 0, 0xf0]);
    assert_eq!(AP_VECTOR as usize, (usize::from(ROM_SEGMENT) * 16 + AP_OFFSET) >> 12);
}

#[test]
fn the_descriptors_limit_is_the_payloads() {
    assert_eq!(descriptors_limit_of_all(), descriptors_limit(MAX_VCPUS));
}
