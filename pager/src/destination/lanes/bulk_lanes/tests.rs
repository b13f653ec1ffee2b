use super::*;

#[test]
fn shares_hold_every_page_once() {
    let pages = |region, page, count| PageRun { region, page, count };
    let range = |region, page, count| PageRange { region, page, count };
    assert!(shares(&[], 3).is_empty());
    assert_eq!(shares(&[pages(0, 5, 1)], 4), vec![vec![range(0, 5, 1)]]);
    let split = shares(&[pages(0, 0, 5), pages(1, 2, 4)], 2);
    assert_eq!(split, vec![vec![range(0, 0, 5)], vec![range(1, 2, 4)]]);
    let split = shares(&[pages(0, 0, 10)], 3);
    assert_eq!(split, vec![vec![range(0, 0, 4)], vec![range(0, 4, 4)], vec![range(0, 8, 2)]]);
}

#[test]
fn the_push_is_tried_again_at_growing_intervals() {
    let delays: Vec<_> = (0..10).map(|failures| retry_delay(failures).as_millis()).collect();
    assert_eq!(delays, [100, 100, 200, 400, 800, 1600, 3200, 6400, 6400, 6400]);
}
