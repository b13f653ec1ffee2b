use std::cell::Cell;

use super::*;

fn every_hundredth(first: u64, count: u64) -> Result<Vec<bool>, ()> {
    Ok((first..first + count).map(|page| page % 100 == 0).collect())
}

#[test]
fn the_copy_has_the_markers_of_any_range() {
    let copy = MarkerCopy::new(2000, 1);
    assert_eq!(copy.markers(0, 1), None, "nothing was looked up yet");
    copy.fill(&|| true, every_hundredth).unwrap();
    for (page, count) in [(0, 2000), (0, 1), (1, 99), (100, 1), (99, 3), (512, 512), (1999, 1)] {
        assert_eq!(copy.markers(page, count), Some(every_hundredth(page, count).unwrap()), "{page} + {count}");
    }
    assert_eq!(copy.markers(1999, 2), None, "past the end");
}

#[test]
fn a_range_not_looked_up_has_no_answer() {
    let copy = MarkerCopy::new(2000, 1);
    let ends = |first, count| if first == 0 { every_hundredth(first, count) } else { Err(()) };
    copy.fill(&|| true, ends).unwrap_err();
    assert_eq!((copy.markers(0, 512).is_some(), copy.markers(511, 2)), (true, None));
    copy.fill(&|| false, every_hundredth).unwrap();
    assert_eq!(copy.markers(511, 2), None);
    copy.fill(&|| true, every_hundredth).unwrap();
    assert_eq!(copy.markers(0, 2000), Some(every_hundredth(0, 2000).unwrap()), "it goes on where it ended");
}

#[test]
fn copy_of_an_earlier_stop_counts_for_nothing() {
    let copy = MarkerCopy::new(2000, 1);
    copy.fill(&|| true, every_hundredth).unwrap();
    copy.forget();
    assert_eq!(copy.markers(0, 1), None);
    let stopped_again = Cell::new(false);
    let stops_in_between = |first, count| {
        if first == 512 && !stopped_again.replace(true) {
            copy.forget();
        }
        every_hundredth(first, count)
    };
    copy.fill(&|| true, stops_in_between).unwrap();
    assert_eq!(copy.markers(0, 1), None, "neither what was found before the stop nor what was found across it");
}

#[test]
fn huge_page_is_looked_up_as_a_whole() {
    let copy = MarkerCopy::new(4 * 1024, 1024);
    copy.fill(
        &|| true,
        |first, count| if (first % 1024, count) == (0, 1024) { Ok(vec![first == 1024; 1024]) } else { Err(()) },
    )
    .unwrap();
    let mut half = vec![true; 1024];
    half[512..].fill(false);
    assert_eq!(copy.markers(1536, 1024), Some(half));
}
