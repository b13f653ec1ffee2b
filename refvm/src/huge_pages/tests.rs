use super::*;

#[test]
fn a_shortage_names_the_setting_and_a_number_that_is_enough() {
    let host = tempfile::tempdir().unwrap();
    for (kib, total, free, reserved) in [(2048, 300, 40, 10), (1 << 20, 0, 0, 0)] {
        let pool = host.path().join(format!("hugepages-{kib}kB"));
        fs::create_dir(&pool).unwrap();
        for (name, number) in [("nr_hugepages", total), ("free_hugepages", free), ("resv_hugepages", reserved)] {
            fs::write(pool.join(name), format!("{number}\n")).unwrap();
        }
    }
    let pool = |page_size| Pool::read(host.path(), page_size, Some(2 << 20));
    assert_eq!(
        pool(2 << 20).unwrap().shortage(100 << 20),
        "50 huge pages of 2 MiB are needed, 30 of 300 are free on this host; set more aside: sysctl vm.nr_hugepages=320"
    );
    let large = pool(1 << 30).unwrap().shortage(2 << 30);
    assert!(large.contains(": echo 2 > ") && large.ends_with("hugepages-1048576kB/nr_hugepages"), "{large}");
    assert_eq!(pool(512 << 20), None);
}

#[test]
fn the_flags_are_those_of_the_kernel_headers() {
    assert_eq!(size_flag(2 << 20), libc::MAP_HUGE_2MB as u32);
    assert_eq!(size_flag(1 << 30), libc::MFD_HUGE_1GB);
}
