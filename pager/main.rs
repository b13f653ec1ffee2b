//! The pager program.
fn main() {}
