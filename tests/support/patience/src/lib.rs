//! How long Rust tests wait before they give up, on machines of any speed: `VMFERRY_PATIENCE` multiplies each deadline,
//! as in the Python tests.

use std::time::Duration;

/// A deadline that is generous on an idle machine, as long as this machine needs.
///
/// # Panics
///
/// `VMFERRY_PATIENCE` is no positive number.
pub fn patient(seconds: f64) -> Duration {
    let text = std::env::var("VMFERRY_PATIENCE").unwrap_or_default();
    Duration::from_secs_f64(seconds * factor(&text))
}

fn factor(text: &str) -> f64 {
    let factor = if text.is_empty() { Some(1.0) } else { text.parse().ok() };
    factor
        .filter(|factor| *factor > 0.0 && f64::is_finite(*factor))
        .unwrap_or_else(|| panic!("VMFERRY_PATIENCE={text:?}: set it to a positive number"))
}

#[cfg(test)]
mod tests;
