use proptest::prelude::*;

use super::*;
use crate::layout::{Backing, Gpa, Region};

const PAGES: u64 = 6;

fn layout() -> MemoryLayout {
    let region = Region { gpa: Gpa(0), size: PAGES << 12, page_size: 4096, backing: Backing::Anonymous };
    MemoryLayout::new(vec![region]).unwrap()
}

/// The pager's actions, and events that happen to it. COPY is an act of the kernel model below, guarded by the table
/// alone.
#[derive(Debug, Clone, Copy)]
enum Step {
    Fault(u64),
    Arrive(u64, Arrival),
    /// The page is claimed and the pager dies before (false) or after (true) the ioctl.
    CrashInInstall(u64, bool),
    Poison(u64, bool),
    Told(u64),
    Discard(u64),
    LinkLost,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let page = 0..PAGES;
    let arrival = prop_oneof![Just(Arrival::Demand), Just(Arrival::Push), Just(Arrival::Zero)];
    prop_oneof![
        page.clone().prop_map(Step::Fault),
        (page.clone(), arrival).prop_map(|(p, a)| Step::Arrive(p, a)),
        (page.clone(), any::<bool>()).prop_map(|(p, done)| Step::CrashInInstall(p, done)),
        (page.clone(), any::<bool>()).prop_map(|(p, told)| Step::Poison(p, told)),
        page.clone().prop_map(Step::Told),
        page.prop_map(Step::Discard),
        Just(Step::LinkLost),
        Just(Step::Reopen),
    ]
}

/// The contents of one mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mapped {
    Nothing,
    Data,
    Zero,
    Marker,
}

struct Model {
    dir: tempfile::TempDir,
    table: Option<PageTable>,
    mapped: [Mapped; PAGES as usize],
    poisoned: [bool; PAGES as usize],
    /// Zeros are right for the page: the source said so, or the guest gave it back.
    may_be_zero: [bool; PAGES as usize],
}

impl Model {
    fn new() -> Self {
        let mut model = Self {
            dir: tempfile::tempdir().unwrap(),
            table: None,
            mapped: [Mapped::Nothing; PAGES as usize],
            poisoned: [false; PAGES as usize],
            may_be_zero: [false; PAGES as usize],
        };
        model.reopen();
        model
    }

    fn reopen(&mut self) {
        self.table = None;
        self.table = Some(PageTable::open(&self.dir.path().join("pages"), &layout()).unwrap().0);
    }

    fn table(&mut self) -> &mut PageTable {
        self.table.as_mut().unwrap()
    }

    /// COPY or ZEROPAGE as the kernel does it: over a marker it succeeds, which un-poisons.
    fn write(&mut self, page: u64, what: Mapped) {
        let slot = &mut self.mapped[page as usize];
        assert!(!self.poisoned[page as usize], "I1: page {page} is written after it was poison");
        if matches!(slot, Mapped::Nothing | Mapped::Marker) {
            *slot = what;
        }
    }

    fn arrive(&mut self, page: u64, arrival: Arrival) {
        let index = PageIndex(page);
        if self.table().claim_for_install(index) {
            assert_eq!(self.table().state(index), Some(PageState::Installing), "I5: written without a claim");
            let zero = arrival == Arrival::Zero;
            self.may_be_zero[page as usize] |= zero;
            self.write(page, if zero { Mapped::Zero } else { Mapped::Data });
            assert!(self.table().mark_installed(index, arrival));
        }
    }

    fn fault(&mut self, page: u64) {
        let index = PageIndex(page);
        match self.table().state(index).unwrap() {
            PageState::Absent => assert!(self.table().claim_for_request(index)),
            PageState::Discarded => {
                assert!(self.may_be_zero[page as usize], "I2: zeros for a page that has not arrived");
                self.write(page, Mapped::Zero);
            }
            state if state.is_poisoned() => {
                if self.mapped[page as usize] == Mapped::Nothing {
                    self.mapped[page as usize] = Mapped::Marker;
                }
            }
            _ => assert!(!self.table().claim_for_request(index)),
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Fault(page) => self.fault(page),
            Step::Arrive(page, arrival) => self.arrive(page, arrival),
            Step::CrashInInstall(page, done) => {
                if self.table().claim_for_install(PageIndex(page)) && done {
                    self.write(page, Mapped::Data);
                }
                self.reopen();
            }
            Step::Poison(page, told) => match self.table().mark_poisoned(PageIndex(page), told) {
                PoisonOutcome::New { .. } => self.poisoned[page as usize] = true,
                PoisonOutcome::Already { .. } => assert!(self.poisoned[page as usize]),
                outcome => assert_eq!(outcome, PoisonOutcome::Healed),
            },
            Step::Told(page) => {
                self.table().mark_told(PageIndex(page));
            }
            Step::Discard(page) => {
                self.mapped[page as usize] = Mapped::Nothing;
                if self.table().mark_discarded(PageIndex(page)) == DiscardOutcome::Discarded {
                    self.may_be_zero[page as usize] = true;
                }
            }
            Step::LinkLost => (0..PAGES).for_each(|page| {
                self.table().release_request(PageIndex(page));
            }),
            Step::Reopen => self.reopen(),
        }
    }

    fn check(&mut self) {
        let mut by_state = Counts::default();
        for page in 0..PAGES {
            let state = self.table().state(PageIndex(page)).unwrap();
            by_state.0[state as usize] += 1;
            assert_eq!(state.is_poisoned(), self.poisoned[page as usize], "I1: page {page} is {state:?}");
            let mapped = self.mapped[page as usize];
            let zero_is_right = self.may_be_zero[page as usize];
            assert!(mapped != Mapped::Zero || zero_is_right, "I2: page {page} reads as zeros");
            let marked_good = state.is_present() && !matches!(mapped, Mapped::Data | Mapped::Zero);
            assert!(!marked_good, "I2: page {page} is {state:?} but nothing is mapped");
        }
        let counts = self.table().counts();
        assert_eq!(counts, by_state);
        assert_eq!(counts.0.iter().sum::<u64>(), PAGES);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// I1 (never un-poisoned), I2 (never zeros for a page that has not arrived), I5 (only claimed pages are
    /// written), over any interleaving of faults, arrivals, poison, discards, lost links and crashes.
    #[test]
    fn invariants_hold_over_any_interleaving(steps in proptest::collection::vec(step(), 0..60)) {
        let mut model = Model::new();
        for step in steps {
            model.take(step);
            model.check();
        }
    }
}

#[test]
fn counts_survive_a_reopen_and_work_under_way_is_absent_again() {
    let mut model = Model::new();
    let table = model.table();
    assert!(table.claim_for_request(PageIndex(0)));
    assert!(table.claim_for_install(PageIndex(1)));
    for (page, arrival) in [(2, Arrival::Demand), (3, Arrival::Push), (4, Arrival::Zero)] {
        assert!(table.claim_for_install(PageIndex(page)));
        assert!(table.mark_installed(PageIndex(page), arrival));
    }
    table.mark_poisoned(PageIndex(5), false);
    table.add(Word::BytesReceived, 8192);
    model.reopen();
    let table = model.table();
    let counts = table.counts();
    assert_eq!(counts.missing(), 2);
    assert_eq!(counts.of(PageState::Absent), 2);
    assert_eq!(counts.of(PageState::PresentDemand), 1);
    assert_eq!(counts.of(PageState::PresentPush), 1);
    assert_eq!(counts.of(PageState::PresentZero), 1);
    assert_eq!(counts.poisoned(), 1);
    assert_eq!(table.word(Word::BytesReceived), 8192);
}

#[test]
fn a_good_copy_heals_an_error_that_no_guest_has_seen() {
    let mut model = Model::new();
    let table = model.table();
    assert!(table.claim_for_install(PageIndex(0)) && table.mark_installed(PageIndex(0), Arrival::Push));
    assert_eq!(table.mark_poisoned(PageIndex(0), false), PoisonOutcome::Healed);
    let new = PoisonOutcome::New { tell: false, was: PageState::PresentPush };
    assert_eq!(table.mark_poisoned(PageIndex(0), true), new);
    assert_eq!(table.mark_poisoned(PageIndex(0), false), PoisonOutcome::Already { tell: false });
    assert_eq!(table.mark_poisoned(PageIndex(PAGES), false), PoisonOutcome::Outside);
}

#[test]
fn runs_are_split_at_every_page_that_does_not_answer() {
    let mut model = Model::new();
    let table = model.table();
    table.mark_poisoned(PageIndex(2), false);
    table.mark_poisoned(PageIndex(5), false);
    let runs = table.runs(PageIndex(0), PageIndex(PAGES), |s| !s.is_poisoned());
    assert_eq!(runs, vec![(PageIndex(0), PageIndex(2)), (PageIndex(3), PageIndex(5))]);
    assert_eq!(table.runs(PageIndex(3), PageIndex(5), |_| true), vec![(PageIndex(3), PageIndex(5))]);
}

#[test]
fn a_used_table_is_bound_to_its_vmm() {
    let mut model = Model::new();
    let table = model.table();
    assert!(table.bind(10, 1));
    assert!(table.bind(11, 1), "nothing has arrived yet");
    assert!(table.claim_for_install(PageIndex(0)) && table.mark_installed(PageIndex(0), Arrival::Push));
    assert!(table.bind(11, 1));
    assert!(!table.bind(11, 2), "a recycled pid");
    assert!(!table.bind(12, 1));
}
