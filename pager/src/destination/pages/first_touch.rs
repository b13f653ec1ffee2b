//! Latency of first touches, in an HDR histogram.

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::proto::LatencySummary;

/// Upper bounds of the buckets that the summary carries: ten steps a decade, 10 µs to 10 s, in nanoseconds.
const BOUNDS_NS: [u64; 61] = bounds();

/// The R10 series of preferred numbers (ISO 3), in thousandths of its decade.
const fn bounds() -> [u64; 61] {
    const STEPS: [u64; 10] = [1000, 1250, 1600, 2000, 2500, 3150, 4000, 5000, 6300, 8000];
    let mut bounds = [0; 61];
    let (mut index, mut decade) = (0, 10);
    while index < bounds.len() {
        bounds[index] = STEPS[index % 10] * decade;
        index += 1;
        if index % 10 == 0 {
            decade *= 10;
        }
    }
    bounds
}

/// From the uffd event read to the page installed; one microsecond to an hour, three digits.
#[derive(Debug, Clone)]
pub struct FirstTouch {
    /// In nanoseconds; `None` only if the bounds above were not valid.
    histogram: Option<Histogram<u64>>,
    /// Touches above the bound before and up to this one; the last has the rest.
    buckets: [u64; BOUNDS_NS.len() + 1],
    sum_ns: u64,
}

impl Default for FirstTouch {
    fn default() -> Self {
        Self {
            histogram: Histogram::new_with_bounds(1_000, 3_600_000_000_000, 3).ok(),
            buckets: [0; BOUNDS_NS.len() + 1],
            sum_ns: 0,
        }
    }
}

impl FirstTouch {
    /// Records one first touch; longer than an hour counts as an hour.
    pub fn record(&mut self, waited: Duration) {
        let waited_ns = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
        if let Some(histogram) = &mut self.histogram {
            histogram.saturating_record(waited_ns);
        }
        if let Some(bucket) = self.buckets.get_mut(BOUNDS_NS.partition_point(|bound| *bound < waited_ns)) {
            *bucket += 1;
        }
        self.sum_ns = self.sum_ns.saturating_add(waited_ns);
    }

    /// What the control service shows, in microseconds; zeros before the first.
    pub fn summary(&self) -> LatencySummary {
        let Some(histogram) = self.histogram.as_ref().filter(|h| !h.is_empty()) else {
            return LatencySummary::default();
        };
        let used = self.buckets.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1_000.0;
        LatencySummary {
            count: histogram.len(),
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            max_us: histogram.max() as f64 / 1_000.0,
            buckets: self.buckets.iter().take(used).copied().collect(),
            sum_us: self.sum_ns as f64 / 1_000.0,
        }
    }
}

#[cfg(test)]
mod tests;
