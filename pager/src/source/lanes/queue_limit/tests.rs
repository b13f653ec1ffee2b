use super::*;

const BASE: Duration = Duration::from_millis(1);
const STEP: Duration = Duration::from_micros(500);
const LONGEST_QUEUE: Duration = Duration::from_millis(500);

/// A link with a queue that is as long as it gets: bytes a second, bytes that wait, bytes that came out.
struct Link {
    rate: f64,
    queue: f64,
    out: f64,
    others: Duration,
    deviation: Duration,
    now: Instant,
    limit: QueueLimit,
    longest: Duration,
}

impl Link {
    fn new(rate: f64) -> Self {
        let (now, others, deviation) = (Instant::now(), Duration::ZERO, Duration::ZERO);
        Self {
            rate,
            queue: 0.0,
            out: 0.0,
            others,
            deviation,
            now,
            limit: QueueLimit::new(now),
            longest: Duration::ZERO,
        }
    }

    /// The sender offers so many bytes a second.
    fn run(&mut self, time: Duration, offered: f64) {
        let end = self.now + time;
        self.longest = Duration::ZERO;
        while self.now < end {
            self.now += STEP;
            let sent = self.limit.pace().map_or(offered, |pace| offered.min(pace as f64));
            // A full queue drops the rest, which is sent again.
            self.queue = (self.queue + sent * STEP.as_secs_f64()).min(self.rate * LONGEST_QUEUE.as_secs_f64());
            let out = self.queue.min(self.rate * STEP.as_secs_f64());
            self.queue -= out;
            self.out += out;
            let rtt = BASE + self.others + Duration::from_secs_f64(self.queue / self.rate);
            self.longest = self.longest.max(rtt - BASE);
            if self.limit.is_due(self.now) {
                let waits = offered > self.rate;
                let (rtt_deviation, bytes_acked) = (self.deviation, self.out as u64);
                let look = Look { rtt, rtt_deviation, min_rtt: BASE, bytes_acked, waits };
                self.limit.look(self.now, look);
            }
        }
    }
}

#[test]
fn the_queue_of_a_bottleneck_becomes_short_and_the_link_stays_busy() {
    for rate in [1e6, 12.5e6, 125e6] {
        let mut link = Link::new(rate);
        link.run(Duration::from_secs(2), rate * 4.0);
        let before = link.out;
        link.run(Duration::from_secs(4), rate * 4.0);
        assert!(link.longest < Duration::from_millis(8), "{rate}: {:?}", link.longest);
        assert!(link.out - before > rate * 4.0 * 0.8, "{rate}: {}", (link.out - before) / rate / 4.0);
    }
}

#[test]
fn where_the_network_is_not_the_limit_there_is_no_pace() {
    let mut link = Link::new(1e9);
    link.run(Duration::from_secs(2), 0.9e9);
    assert_eq!(link.limit.pace(), None);
    // A round trip that is long because acknowledgements wait: nothing of ours is queued.
    link.others = Duration::from_millis(40);
    link.run(Duration::from_secs(2), 1e6);
    assert_eq!(link.limit.pace(), None);
}

#[test]
fn jitter_of_the_path_is_no_queue() {
    let began = Instant::now();
    let paces = |deviation_ms| {
        let mut limit = QueueLimit::new(began);
        let rtt_deviation = Duration::from_millis(deviation_ms);
        for number in 1..100 {
            let look = Look { rtt: BASE * 11, rtt_deviation, min_rtt: BASE, bytes_acked: number * 10_000, waits: true };
            limit.look(began + Duration::from_millis(10) * number as u32, look);
        }
        limit.pace().is_some()
    };
    assert!(!paces(3));
    assert!(paces(1));
}

#[test]
fn a_queue_that_others_fill_is_not_given_way_to_for_ever() {
    let mut link = Link::new(12.5e6);
    link.others = Duration::from_millis(50);
    let before = link.out;
    link.run(Duration::from_secs(20), 50e6);
    assert!(link.out - before > 12.5e6 * 20.0 / 2.0, "{}", link.out - before);
}

#[test]
fn a_link_that_becomes_wider_is_used() {
    let mut link = Link::new(1e6);
    link.run(Duration::from_secs(3), 1e9);
    assert!(link.limit.pace().is_some());
    link.rate = 100e6;
    link.queue = 0.0;
    link.run(Duration::from_secs(2), 1e9);
    let before = link.out;
    link.run(Duration::from_secs(2), 1e9);
    assert!(link.out - before > 100e6, "{}", link.out - before);
}
