use super::*;
use proptest::prelude::*;

proptest! {
    #[test]
    fn frames_survive_any_cut(
        texts in proptest::collection::vec(".{0,60}", 0..6),
        cuts in proptest::collection::vec(1usize..40, 1..20),
    ) {
        let messages: Vec<_> = texts.into_iter().map(serde_json::Value::String).collect();
        let stream: Vec<u8> = messages.iter().flat_map(|m| encode(m, 4096).unwrap()).collect();
        let (mut decoder, mut found, mut at) = (Decoder::new(4096), Vec::new(), 0);
        let mut cuts = cuts.iter().cycle();
        while at < stream.len() {
            let end = stream.len().min(at + cuts.next().unwrap());
            decoder.push(&stream[at..end]);
            at = end;
            while let Some(frame) = decoder.next_frame().unwrap() {
                found.push(serde_json::from_slice::<serde_json::Value>(&frame).unwrap());
            }
        }
        prop_assert_eq!(found, messages);
    }

    #[test]
    fn any_bytes_give_frames_within_the_limit_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut decoder = Decoder::new(64);
        decoder.push(&bytes);
        while let Ok(Some(frame)) = decoder.next_frame() {
            prop_assert!(frame.len() <= 64);
        }
    }
}

#[test]
fn a_length_beyond_the_limit_is_refused_before_its_bytes_arrive() {
    let mut decoder = Decoder::new(MEMORY_LIMIT);
    decoder.push(&(MEMORY_LIMIT as u32 + 1).to_be_bytes());
    assert_eq!(decoder.next_frame(), Err(TooLong { announced: MEMORY_LIMIT + 1, limit: MEMORY_LIMIT }));
    assert!(encode(&serde_json::json!("x".repeat(100)), 64).is_err());
}
