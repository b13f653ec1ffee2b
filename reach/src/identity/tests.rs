use super::*;

#[test]
fn a_name_with_brackets_and_spaces_hides_no_field() {
    let stat = "7 (a) 1 (b c) S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4711 1000 1";
    assert_eq!(stat_field(stat, FLAGS), Some(4_194_304));
    assert_eq!(stat_field(stat, START_TIME), Some(4711));
    assert_eq!(stat_field("7 (a) S 1", START_TIME), None);
}

#[test]
fn a_field_is_found_by_its_whole_name() {
    let status = "Tgid:\t7\nNgid:\t0\nPid:\t8\nTracerPid:\t0\nUid:\t1\t2\t3\t4\n";
    assert_eq!(status_field(status, "Pid"), Some("8"));
    assert_eq!(status_field(status, "Uid"), Some("1\t2\t3\t4"));
    assert_eq!(status_field(status, "Gid"), None);
}
