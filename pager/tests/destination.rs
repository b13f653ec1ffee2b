//! The pager program as a destination, end to end. The test drives it over `pager.sock`, and stands in for the VMM and for
//! the source. Skipped, with the reason printed, without a userfaultfd.

#![allow(clippy::unwrap_used, missing_docs, dead_code)]

mod rig;

use std::time::Duration;

use rig::{Answer, PAGE, Rig, Vmm, eventually};
use vmferry_pager::internals::{Backing, Tuning};
use vmferry_pager::proto::{self, ErrorOrigin, LinkState, MemoryError, Severity, pager_event::Event};

/// What the source of these tests holds at a page.
fn plan(page: u64) -> Answer {
    match page % 8 {
        0 => Answer::Zero,
        5 => Answer::Poison { guest_visible: page % 16 == 5 },
        _ => Answer::Data,
    }
}

fn poisoned(pages: u64) -> Vec<u64> {
    (0..pages).filter(|p| p % 8 == 5).collect()
}

async fn everything_arrives(backing: Backing, ahead: bool) {
    let pages = 256;
    let Some(mut rig) = Rig::start(backing, pages, plan).await else { return };
    if ahead {
        rig.preallocate(0, pages).await;
    }
    rig.connect().await.unwrap();
    // By demand, several threads on one page: asked once.
    let touches: Vec<_> = (0..3).map(|_| rig.vmm.touch(3)).collect();
    for touch in touches {
        assert_eq!(touch.await.unwrap(), rig::byte_of(3));
    }
    assert_eq!(rig.source.demanded(), vec![3]);
    assert_eq!(rig.vmm.touch(8).await.unwrap(), 0);
    rig.push().await.unwrap();
    rig.event(|e| matches!(e, Event::AllPresent(_))).await;
    for page in (0..pages).filter(|p| plan(*p) == Answer::Data) {
        assert_eq!(rig.vmm.touch(page).await.unwrap(), rig::byte_of(page), "page {page}");
    }
    for page in (0..pages).filter(|p| plan(*p) == Answer::Zero) {
        assert_eq!(rig.vmm.touch(page).await.unwrap(), 0, "page {page}");
    }
    for page in poisoned(pages) {
        assert!(rig.vmm.is_marked(page).await, "page {page}");
    }
    let told: Vec<u64> =
        rig.vmm.told(poisoned(pages).len() / 2).await.iter().map(|t| t["gpa"].as_u64().unwrap()).collect();
    let unseen: Vec<u64> = poisoned(pages).into_iter().filter(|p| p % 16 != 5).map(|p| p * PAGE).collect();
    assert_eq!(told, unseen, "each page that the guest does not know of is reported once, as AO");
    let progress = rig.progress().await;
    let sum = progress.absent + progress.demand + progress.push + progress.zero + progress.poison + progress.discarded;
    assert_eq!((sum, progress.absent, progress.poison), (pages, 0, poisoned(pages).len() as u64));
    assert!(progress.first_touch.unwrap().count >= 2);
    let guarded = rig.control.complete(proto::CompleteRequest {}).await.unwrap().into_inner().guarded_pages;
    assert_eq!(guarded, poisoned(pages).len() as u64);
    assert!(rig.vmm.is_marked(5).await);
    rig.end().await;
}

#[tokio::test]
async fn everything_arrives_in_anonymous_memory() {
    everything_arrives(Backing::Anonymous, false).await;
}

#[tokio::test]
async fn everything_arrives_in_a_memfd() {
    everything_arrives(Backing::Memfd, false).await;
}

#[tokio::test]
async fn everything_arrives_in_memory_that_was_allocated_ahead() {
    everything_arrives(Backing::Memfd, true).await;
}

/// Of nine blocks the first are made of small pages and the others of huge ones, if this machine has them for less.
#[tokio::test]
async fn everything_arrives_in_memory_that_was_made_ready_in_huge_pages() {
    let (pages, block) = (9 * 512 + 7, 512);
    let tuning = Tuning { huge_pages: true, ..Tuning::default() };
    let Some(mut rig) = Rig::start_tuned(Backing::Memfd, pages, plan, tuning).await else { return };
    rig.preallocate(0, pages).await;
    rig.connect().await.unwrap();
    // Given back in the middle of a block, before and after it comes.
    rig.vmm.remove(3 * block + 70, 2).await;
    eventually("they are given back", async || rig.progress().await.discarded == 2).await;
    rig.push().await.unwrap();
    rig.event(|e| matches!(e, Event::AllPresent(_))).await;
    rig.vmm.remove(4 * block + 70, 2).await;
    eventually("they are given back", async || rig.progress().await.discarded == 4).await;
    let gone = [3 * block + 70, 3 * block + 71, 4 * block + 70, 4 * block + 71];
    for page in (0..pages).filter(|page| !matches!(plan(*page), Answer::Poison { .. })) {
        let expected = if gone.contains(&page) || plan(page) == Answer::Zero { 0 } else { rig::byte_of(page) };
        assert_eq!(rig.vmm.touch(page).await.unwrap(), expected, "page {page}");
    }
    for page in poisoned(pages) {
        assert!(rig.vmm.is_marked(page).await, "page {page}");
    }
    rig.end().await;
}

#[tokio::test]
async fn a_bad_page_is_reported_while_the_push_continues() {
    let plan = |page| match page {
        5 => Answer::Poison { guest_visible: false },
        9 => Answer::Stall,
        _ => Answer::Data,
    };
    let Some(mut rig) = Rig::start(Backing::Anonymous, 16, plan).await else { return };
    rig.connect().await.unwrap();
    let mut events = rig.control.watch_events(proto::WatchEventsRequest { after: 0 }).await.unwrap().into_inner();
    rig.push().await.unwrap();
    loop {
        let next = tokio::time::timeout(*rig::PATIENCE, events.message()).await.expect("it is not told of");
        if matches!(next.unwrap().unwrap().event, Some(Event::MemoryError(_))) {
            break;
        }
    }
    rig.end().await;
}

async fn given_back_during_the_push(backing: Backing) {
    let pages = 4096;
    let Some(mut rig) = Rig::start(backing, pages, |_| Answer::Data).await else { return };
    if backing == Backing::Memfd {
        rig.preallocate(0, pages).await;
    }
    rig.connect().await.unwrap();
    rig.push().await.unwrap();
    for page in (0..pages).rev().step_by(61) {
        rig.vmm.remove(page, 1).await;
    }
    rig.event(|e| matches!(e, Event::AllPresent(_))).await;
    for page in 0..pages {
        let expected = if (pages - 1 - page) % 61 == 0 { 0 } else { rig::byte_of(page) };
        assert_eq!(rig.vmm.touch(page).await.unwrap(), expected, "page {page}");
    }
    rig.end().await;
}

#[tokio::test]
async fn page_of_a_memfd_given_back_during_the_push_is_not_filled() {
    given_back_during_the_push(Backing::Memfd).await;
}

#[tokio::test]
async fn anonymous_page_given_back_during_the_push_is_not_filled() {
    given_back_during_the_push(Backing::Anonymous).await;
}

/// Of the source's frame of 64 pages some are there already, some given back, some not allocated ahead.
#[tokio::test]
async fn a_frame_of_which_not_all_is_wanted_changes_nothing_else() {
    let Some(mut rig) = Rig::start(Backing::Memfd, 192, |_| Answer::Data).await else { return };
    rig.preallocate(0, 150).await;
    rig.connect().await.unwrap();
    assert_eq!(rig.vmm.touch(3).await.unwrap(), rig::byte_of(3));
    rig.vmm.remove(70, 2).await;
    eventually("they are given back", async || rig.progress().await.discarded == 2).await;
    rig.source.answer(|page| if page == 3 { Answer::Zero } else { Answer::Data });
    rig.push().await.unwrap();
    rig.event(|e| matches!(e, Event::AllPresent(_))).await;
    for page in 0..192 {
        let expected = if (70..72).contains(&page) { 0 } else { rig::byte_of(page) };
        assert_eq!(rig.vmm.touch(page).await.unwrap(), expected, "page {page}");
    }
    rig.end().await;
}

#[tokio::test]
async fn poison_is_reported_before_the_thread_that_waits_is_woken() {
    let Some(mut rig) = Rig::start(Backing::Anonymous, 16, |_| Answer::Poison { guest_visible: false }).await else {
        return;
    };
    rig.connect().await.unwrap();
    let (thread, touch) = rig.vmm.try_touch(2);
    assert!(Vmm::is_refused(touch).await);
    // It went on, so the frame is there already; the VMM is woken for it behind.
    let told = rig.vmm.told_by_now();
    assert_eq!((told[0]["gpa"].as_u64(), told[0]["severity"].as_str()), (Some(2 * PAGE), Some("AR")));
    assert_eq!(told[0]["thread"].as_u64(), Some(u64::from(thread.await.unwrap())));
    rig.vmm.rung().await;
    let Event::MemoryError(event) = rig.event(|e| matches!(e, Event::MemoryError(_))).await else { unreachable!() };
    let error = event.error.unwrap();
    assert!(event.reported && error.guest_visible);
    assert_eq!((error.gpa, error.lsb, error.severity()), (2 * PAGE, 12, Severity::ActionRequired));
    // A second touch meets the marker in the kernel; nothing is reported again.
    assert!(rig.vmm.is_marked(2).await);
    assert_eq!(rig.progress().await.machine_checks, 1);
    rig.end().await;
}

#[tokio::test]
async fn known_poison_splits_the_push_and_heals_arrived_pages() {
    let Some(mut rig) = Rig::start(Backing::Memfd, 64, |_| Answer::Data).await else { return };
    let error = |page: u64, guest_visible| MemoryError {
        gpa: page * PAGE,
        lsb: 12,
        origin: ErrorOrigin::Operator.into(),
        guest_visible,
        ..MemoryError::default()
    };
    let errors = vec![error(10, true), error(20, false)];
    let reply =
        rig.control.mark_poisoned(proto::MarkPoisonedRequest { errors: errors.clone() }).await.unwrap().into_inner();
    assert_eq!((reply.marked, reply.already, reply.healed), (2, 0, 0));
    let told = rig.vmm.told(1).await;
    rig.vmm.rung().await;
    assert_eq!(told[0]["gpa"].as_u64(), Some(20 * PAGE));
    assert_eq!((told[0]["severity"].as_str(), told[0]["origin"].as_str()), (Some("AO"), Some("operator")));
    rig.connect().await.unwrap();
    rig.push().await.unwrap();
    rig.event(|e| matches!(e, Event::AllPresent(_))).await;
    assert!(rig.vmm.is_marked(10).await && rig.vmm.is_marked(20).await);
    assert_eq!(rig.vmm.touch(11).await.unwrap(), rig::byte_of(11));
    let errors = vec![errors[0], error(30, false)];
    let reply = rig.control.mark_poisoned(proto::MarkPoisonedRequest { errors }).await.unwrap().into_inner();
    assert_eq!((reply.marked, reply.already, reply.healed), (0, 1, 1));
    rig.end().await;
}

#[tokio::test]
async fn a_lost_link_loses_nothing() {
    let Some(mut rig) = Rig::start(Backing::Anonymous, 64, |_| Answer::Data).await else { return };
    rig.connect().await.unwrap();
    assert_eq!(rig.vmm.touch(1).await.unwrap(), rig::byte_of(1));
    rig.source.stop().await;
    let waiting = rig.vmm.touch(7);
    let Event::Link(link) = rig.event(|e| matches!(e, Event::Link(l) if l.state() == LinkState::Down)).await else {
        unreachable!()
    };
    assert!(!link.reason.is_empty());
    let late = rig.vmm.touch(9);
    eventually("both faults are read", async || rig.progress().await.faults >= 3).await;
    assert!(!waiting.is_finished() && !late.is_finished());
    rig.source.restart().await;
    rig.connect().await.unwrap();
    assert_eq!(waiting.await.unwrap(), rig::byte_of(7));
    assert_eq!(late.await.unwrap(), rig::byte_of(9));
    rig.push().await.unwrap();
    rig.event(|e| matches!(e, Event::AllPresent(_))).await;
    rig.end().await;
}

#[tokio::test]
async fn a_silent_source_is_a_lost_link() {
    let Some(mut rig) = Rig::start(Backing::Anonymous, 8, |_| Answer::Silence).await else { return };
    rig.timeout = Duration::from_millis(300);
    rig.connect().await.unwrap();
    let waiting = rig.vmm.touch(4);
    let Event::Link(link) = rig.event(|e| matches!(e, Event::Link(l) if l.state() == LinkState::Down)).await else {
        unreachable!()
    };
    assert!(link.reason.contains("0x4000"), "{}", link.reason);
    assert!(!waiting.is_finished());
    rig.source.answer(|_| Answer::Data);
    rig.connect().await.unwrap();
    assert_eq!(waiting.await.unwrap(), rig::byte_of(4));
    rig.end().await;
}

#[tokio::test]
async fn a_removed_page_reads_as_zeros_and_is_never_fetched() {
    let Some(mut rig) = Rig::start(Backing::Anonymous, 16, |_| Answer::Data).await else { return };
    rig.connect().await.unwrap();
    assert_eq!(rig.vmm.touch(2).await.unwrap(), rig::byte_of(2));
    rig.vmm.remove(2, 2).await;
    assert_eq!(rig.vmm.touch(2).await.unwrap(), 0);
    rig.push().await.unwrap();
    rig.event(|e| matches!(e, Event::AllPresent(_))).await;
    assert_eq!(rig.vmm.touch(3).await.unwrap(), 0);
    assert_eq!(rig.progress().await.discarded, 2);
    rig.end().await;
}

#[tokio::test]
async fn a_removed_poisoned_page_stays_poisoned() {
    let Some(mut rig) = Rig::start(Backing::Anonymous, 4, |_| Answer::Poison { guest_visible: true }).await else {
        return;
    };
    rig.connect().await.unwrap();
    rig.push().await.unwrap();
    rig.event(|e| matches!(e, Event::AllPresent(_))).await;
    rig.control.complete(proto::CompleteRequest {}).await.unwrap();
    rig.vmm.remove(1, 1).await;
    assert!(rig.vmm.is_marked(1).await);
    let refused = rig.control.shutdown(proto::ShutdownRequest { even_if_guest_dies: false }).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    rig.end().await;
}

#[tokio::test]
async fn calls_are_idempotent_and_refusals_precise() {
    let Some(mut rig) = Rig::start(Backing::Anonymous, 4, |_| Answer::Data).await else { return };
    let code = |status: tonic::Status| status.code();
    assert_eq!(code(rig.push().await.unwrap_err()), tonic::Code::FailedPrecondition);
    assert_eq!(
        code(rig.control.complete(proto::CompleteRequest {}).await.unwrap_err()),
        tonic::Code::FailedPrecondition
    );
    let freeze = rig.control.freeze(proto::FreezeRequest {}).await.unwrap_err();
    assert_eq!(code(freeze), tonic::Code::FailedPrecondition);
    let other = proto::ExpectDestinationRequest { layout: Some(rig::layout(Backing::Anonymous, 5)) };
    assert_eq!(code(rig.control.expect_destination(other).await.unwrap_err()), tonic::Code::AlreadyExists);
    let same = proto::ExpectDestinationRequest { layout: Some(rig::layout(Backing::Anonymous, 4)) };
    let features = rig.control.expect_destination(same).await.unwrap().into_inner().uffd_features;
    assert!(features.contains(&"UFFD_FEATURE_POISON".to_owned()));
    assert_eq!(code(rig.connect_to("127.0.0.1:1".into()).await.unwrap_err()), tonic::Code::Unavailable);
    rig.connect().await.unwrap();
    rig.connect().await.unwrap();
    rig.push().await.unwrap();
    rig.push().await.unwrap();
    let Event::MemoryAttached(attached) = rig.event(|e| matches!(e, Event::MemoryAttached(_))).await else {
        unreachable!()
    };
    assert_eq!(attached.vmm_pid, rig.vmm.pid());
    rig.event(|e| matches!(e, Event::AllPresent(_))).await;
    rig.end().await;
}
