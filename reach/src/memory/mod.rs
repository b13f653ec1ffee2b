//! The process's memory, looked at from outside: no thread is stopped.

pub mod backing;
pub mod contents;
pub mod mapping;
pub mod presence;
