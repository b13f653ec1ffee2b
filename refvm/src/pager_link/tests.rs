use std::io::Write;

use super::*;
use crate::machine::Block;
use crate::protocol::frame::encode;

fn error(gpa: u64) -> Vec<u8> {
    let frame = json!({"type": "memory_error", "gpa": gpa, "hva": 0, "lsb": 12, "severity": "AO", "thread": 0,
                       "origin": "read", "hop": 0});
    encode(&frame, MEMORY_LIMIT).unwrap()
}

fn next(frames: &mut Frames) -> Block {
    match frames.next() {
        Ok(FromPager::MemoryError(Poisoned { block, waits: None })) => block,
        other => panic!("{other:?}"),
    }
}

#[test]
fn frames_come_when_the_doorbell_rings_and_at_the_end_without() {
    let (stream, mut pager) = UnixStream::pair().unwrap();
    let doorbell = EventFd::new(EFD_NONBLOCK).unwrap();
    let ours = Some(doorbell.try_clone().unwrap());
    let mut frames = Frames { stream, doorbell: ours, decoder: Decoder::new(MEMORY_LIMIT) };
    let reader = std::thread::spawn(move || {
        let blocks = [(); 4].map(|()| next(&mut frames));
        (blocks, matches!(frames.next(), Err(ReadError::Closed)))
    });
    // Two for one ring; one that is rung for too late, or twice; one that is not rung for.
    pager.write_all(&[error(0x1000), error(0x2000)].concat()).unwrap();
    doorbell.write(1).unwrap();
    doorbell.write(1).unwrap();
    pager.write_all(&error(0x3000)).unwrap();
    doorbell.write(1).unwrap();
    pager.write_all(&error(0x4000)).unwrap();
    drop(pager);
    let (blocks, closed) = reader.join().unwrap();
    assert_eq!((blocks, closed), ([0x1000, 0x2000, 0x3000, 0x4000].map(Block::page), true));
}
