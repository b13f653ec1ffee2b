//! The program as a daemon sees it: VMMs of threads, driven over both sockets.

#![allow(clippy::unwrap_used)]

mod control;
mod early_error;
#[path = "../host/huge_pages.rs"]
mod huge_pages;
mod migration;
mod stand_in;
