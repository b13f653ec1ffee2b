use super::*;

#[test]
fn every_stage_is_measured_as_often_as_asked() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let stages = match run(20, 0, backing) {
            Ok(stages) => stages,
            Err(error) => return println!("SKIPPED: {error}"),
        };
        assert_eq!(stages.keys().copied().collect::<Vec<_>>(), ["ask", "fault", "install", "read", "reply", "wake"]);
        assert!(stages.values().all(|us| us.len() == 20 && us.iter().all(|us| *us > 0.0)), "{stages:?}");
    }
}
