use super::*;
use crate::destination::error::{AttachError as Destination, Ended};
use crate::source::SourceError;

#[test]
fn every_refusal_names_the_field_that_it_is_about() {
    let io = || io::Error::from(io::ErrorKind::Other);
    let table: Vec<(AttachMemoryError, &str, &str)> = vec![
        (Destination::Userfaultfd(io()).into(), "uffd", "other error"),
        (Destination::RegionWithoutUserfaultfd.into(), "uffd", "needs one"),
        (Destination::RegionCount.into(), "regions", "number"),
        (Destination::MinorFaults(io()).into(), "regions", "faults on what the file holds"),
        (Destination::ForeignTable { pid: 4711 }.into(), "message", "4711"),
        (Destination::Unanswered(io()).into(), "message", "cannot be answered"),
        (AttachMemoryError::Unexpected, "message", "no memory yet"),
        (SourceError::NotFrozen.into(), "message", "frozen"),
        (AttachMemoryError::Unanswered(io()), "message", "cannot be answered"),
        (Ended.into(), "message", "has ended"),
    ];
    for (error, field, word) in table {
        assert_eq!(field_of(&error), field, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
}
