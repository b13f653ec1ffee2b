//! The KVM machine with its real guest: the guest is the judge, and is judged here.
#![allow(clippy::unwrap_used)]

mod moving;
mod poison;
mod support;
mod workloads;
