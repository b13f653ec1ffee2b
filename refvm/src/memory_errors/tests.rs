use super::*;

#[test]
fn unanswered_errors_keep_number_and_order() {
    let mut unrecorded = UnrecordedErrors::default();
    for gpa in [4096, 8192, 12288] {
        unrecorded.add(json!({"gpa": gpa}));
    }
    unrecorded.recorded(2);
    let left: Vec<_> = unrecorded.waiting().map(|message| message["seq"].as_u64().unwrap()).collect();
    assert_eq!(left, [1, 3]);
    assert_eq!(unrecorded.add(json!({"gpa": 0}))["seq"], 4);
}
