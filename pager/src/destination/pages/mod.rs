//! The state of the pages behind one lock.

pub mod first_touch;
pub mod poison_report;
pub mod resolver;
pub mod shared_pages;
pub mod waiting;
