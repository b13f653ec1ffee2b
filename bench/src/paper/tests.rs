use super::*;

#[test]
fn a_table_is_no_larger_than_a_byte_a_page_and_its_header() {
    let directory = tempfile::tempdir().unwrap();
    let found = measure(directory.path(), 1 << 30).unwrap();
    assert_eq!(found.pages, 1 << 18);
    assert!(found.table_bytes <= found.pages + 4096, "{found:?}");
    assert!(found.full_used_bytes <= found.table_bytes + 4096, "{found:?}");
    assert!(found.order_bytes <= found.pages, "{found:?}");
    assert!(std::fs::read_dir(directory.path()).unwrap().next().is_none());
}
