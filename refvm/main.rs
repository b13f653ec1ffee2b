//! The reference VMM program.
fn main() {}
