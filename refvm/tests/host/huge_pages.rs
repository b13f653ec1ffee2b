//! Huge pages for a test: set aside on this host, and given back.

use std::fs;

const SETTING: &str = "/proc/sys/vm/nr_hugepages";

/// So many pages of 2 MiB more than there were, until it is dropped.
pub struct Reserved(u64);

fn total() -> Option<u64> {
    fs::read_to_string(SETTING).ok()?.trim().parse().ok()
}

/// Sets pages of 2 MiB aside; none, with the reason printed, where that is not possible.
pub fn reserve(pages: u64) -> Option<Reserved> {
    let skipped = |reason: String| -> Option<Reserved> {
        println!("SKIPPED: {pages} huge pages by {SETTING}: {reason}");
        None
    };
    let Some(before) = total() else { return skipped("cannot be read".into()) };
    if let Err(error) = fs::write(SETTING, (before + pages).to_string()) {
        return skipped(error.to_string());
    }
    let made = Reserved(total().unwrap_or(before).saturating_sub(before));
    if made.0 < pages {
        return skipped(format!("the host has {} to give", made.0));
    }
    Some(made)
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let left = total().unwrap_or(0).saturating_sub(self.0);
        if let Err(error) = fs::write(SETTING, left.to_string()) {
            println!("{SETTING} stays: {error}");
        }
    }
}
