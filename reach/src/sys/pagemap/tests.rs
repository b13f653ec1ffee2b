use super::*;

#[test]
fn both_ways_find_the_first_page_with_an_entry() {
    let memory = vec![0u8; 64 << 20];
    let base = (memory.as_ptr() as u64).next_multiple_of(BASE_PAGE);
    let end = base + (32 << 20);
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    for find in [first_entry, first_read_entry] {
        assert_eq!(find(&pagemap, base, end).unwrap(), None);
    }
    let page = base + 5000 * BASE_PAGE;
    std::hint::black_box(memory[(page - memory.as_ptr() as u64) as usize]);
    for find in [first_entry, first_read_entry] {
        assert_eq!(find(&pagemap, base, end).unwrap(), Some(page), "the page of zeros counts");
    }
}
