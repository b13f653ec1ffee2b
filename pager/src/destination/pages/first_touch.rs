//! Latency of first touches, in an HDR histogram.

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::proto::LatencySummary;

/// From the uffd event read to the page installed; one microsecond to an hour, three digits.
#[derive(Debug, Clone)]
pub struct FirstTouch {
    /// In nanoseconds; `None` only if the bounds above were not valid.
    histogram: Option<Histogram<u64>>,
}

impl Default for FirstTouch {
    fn default() -> Self {
        Self { histogram: Histogram::new_with_bounds(1_000, 3_600_000_000_000, 3).ok() }
    }
}

impl FirstTouch {
    /// Records one first touch; longer than an hour counts as an hour.
    pub fn record(&mut self, waited: Duration) {
        if let Some(histogram) = &mut self.histogram {
            histogram.saturating_record(u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX));
        }
    }

    /// What the control service shows, in microseconds; zeros before the first.
    pub fn summary(&self) -> LatencySummary {
        let Some(histogram) = self.histogram.as_ref().filter(|h| !h.is_empty()) else {
            return LatencySummary::default();
        };
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1_000.0;
        LatencySummary {
            count: histogram.len(),
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            max_us: histogram.max() as f64 / 1_000.0,
        }
    }
}

#[cfg(test)]
mod tests;
