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
mod tests {
    use super::factor;

    #[test]
    fn without_a_word_the_factor_is_one() {
        assert_eq!(factor(""), 1.0);
        assert_eq!(factor("30"), 30.0);
        assert_eq!(factor("0.5"), 0.5);
    }

    #[test]
    fn a_factor_that_is_no_positive_number_is_refused() {
        for text in ["0", "-1", "long", "nan", "inf"] {
            assert!(std::panic::catch_unwind(|| factor(text)).is_err(), "{text}");
        }
    }
}
