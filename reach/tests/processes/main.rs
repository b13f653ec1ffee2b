//! The program, and processes that it steps into: each says afterwards what it noticed.
#![allow(clippy::unwrap_used)]

mod asleep;
mod ending;
mod identity;
mod memory;
mod qemu;
mod rig;
mod rights;
mod running;
mod seccomp;
mod served;
mod userfaultfd;
