//! The KVM machine with its real guest: the guest is the judge, and is judged here.
#![allow(clippy::unwrap_used)]

mod huge;
#[path = "../host/huge_pages.rs"]
mod huge_pages;
mod moving;
mod poison;
mod support;
mod workloads;
