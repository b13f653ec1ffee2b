//! The program as a daemon sees it: VMMs of threads, driven over both sockets.

#![allow(clippy::unwrap_used)]

mod control;
mod migration;
mod stand_in;
