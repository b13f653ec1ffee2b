use super::*;

#[test]
fn features_have_the_bits_of_the_kernel_header() {
    assert_eq!(feature_bit("UFFD_FEATURE_PAGEFAULT_FLAG_WP"), Some(1));
    assert_eq!(feature_bit("UFFD_FEATURE_EVENT_REMOVE"), Some(1 << 3));
    assert_eq!(feature_bit("UFFD_FEATURE_THREAD_ID"), Some(1 << 8));
    assert_eq!(feature_bit("UFFD_FEATURE_MISSING_HUGETLBFS"), Some(1 << 4));
    assert_eq!(feature_bit("UFFD_FEATURE_MINOR_HUGETLBFS"), Some(FEATURE_MINOR_HUGETLBFS));
    assert_eq!(feature_bit("UFFD_FEATURE_MINOR_SHMEM"), Some(FEATURE_MINOR_SHMEM));
    assert_eq!(feature_bit("UFFD_FEATURE_POISON"), Some(FEATURE_POISON));
    assert_eq!(feature_bit("UFFD_FEATURE_MOVE"), Some(1 << 16));
    assert_eq!(feature_bit("POISON"), None);
    assert_eq!(feature_bit("UFFD_FEATURE_LOUD"), None);
}
