use super::*;

#[test]
fn features_are_known_by_their_kernel_names() {
    let wanted = ["UFFD_FEATURE_THREAD_ID", "UFFD_FEATURE_POISON"].map(String::from);
    assert_eq!(bits(&wanted).unwrap(), 1 << 8 | 1 << 14);
    assert_eq!(names(1 << 8 | 1 << 14), wanted.join(", "));
    assert!(matches!(bits(&["POISON".into()]), Err(Error::Invalid { .. })));
}
