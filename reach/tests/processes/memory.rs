//! Memory of each kind: described, read, proved empty, emptied.

use std::os::unix::fs::FileExt;

use vmferry_reach::proto::reach_reply::Outcome;
use vmferry_reach::proto::reach_request::Operation;
use vmferry_reach::proto::{
    DescribeReply, DescribeRequest, EmptyReply, EmptyRequest, HvaRange, MappingKind, OpenBacking, ReachErrorCode,
    ReadMemoryRequest, SeccompPolicy,
};

use crate::rig::{Answer, Named, Victim, is_root, reach, rules};

const PAGE: u64 = 4096;
const SIZE: u64 = 64 * PAGE;
const HUGE: u64 = 2 << 20;

/// A victim with memory of a kind, and where it is.
pub fn victim_with(kind: &str, size: u64, touched: &[&str]) -> (Victim, HvaRange) {
    let size_text = size.to_string();
    let arguments: Vec<_> = ["memory", kind, &size_text].into_iter().chain(touched.iter().copied()).collect();
    with_range(Victim::start(&arguments))
}

pub fn with_range(victim: Victim) -> (Victim, HvaRange) {
    let mut words = victim.announced[0].split(' ').skip(1).map(|word| word.parse().unwrap());
    let range = HvaRange { start: words.next().unwrap(), size: words.next().unwrap() };
    (victim.until_asleep(), range)
}

fn empty(victim: &Victim, range: HvaRange, discard: bool) -> Answer {
    let injection = rules(SeccompPolicy::Unspecified, &[]);
    reach(&Named::of_victim(victim), Operation::Empty(EmptyRequest { ranges: vec![range], discard, injection }))
}

fn describe(victim: &Victim, range: HvaRange, open: OpenBacking) -> (DescribeReply, Answer) {
    let request = DescribeRequest { ranges: vec![range], threads: vec![], open_backing: open.into() };
    let answer = reach(&Named::of_victim(victim), Operation::Describe(request));
    match &answer.reply.outcome {
        Some(Outcome::Describe(described)) => (described.clone(), answer),
        other => panic!("{other:?}"),
    }
}

fn huge_pages_free() -> u64 {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    free.ok().and_then(|free| free.trim().parse().ok()).unwrap_or(0)
}

/// A file of a tmpfs, which lives as long as the directory.
fn tmpfs_file() -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let kind = format!("file:{}", directory.path().join("ram").display());
    (directory, kind)
}

#[test]
fn memory_that_was_never_touched_is_empty() {
    let (_directory, file) = tmpfs_file();
    for kind in ["anonymous", "shared", "memfd", "private memfd", &file] {
        if kind == "shared" && !is_root("memory_that_was_never_touched_is_empty of shared memory without a file") {
            continue;
        }
        let (victim, range) = victim_with(kind, SIZE, &[]);
        let answer = empty(&victim, range, false);
        answer.assert_done();
        assert_eq!(answer.reply.outcome, Some(Outcome::Empty(EmptyReply::default())), "{kind}");
        victim.assert_undisturbed();
    }
}

#[test]
fn a_page_that_is_there_is_named_and_discarded() {
    let (_directory, file) = tmpfs_file();
    for (kind, touched) in [
        ("anonymous", "81920"),
        ("anonymous", "look:81920"),
        ("shared", "81920"),
        ("memfd", "81920"),
        ("memfd", "allocate:81920"),
        ("private memfd", "81920"),
        ("private memfd", "allocate:81920"),
        (&file, "81920"),
    ] {
        if kind == "shared" && !is_root("a_page_that_is_there_is_named_and_discarded of shared memory without a file") {
            continue;
        }
        let (mut victim, range) = victim_with(kind, SIZE, &[touched]);
        let page = range.start + 81920;
        let refused = empty(&victim, range, false);
        assert_eq!(refused.assert_error(ReachErrorCode::NotEmpty).address, Some(page), "{kind} {touched}");
        let before = HvaRange { size: 81920, ..range };
        let behind = HvaRange { start: page + PAGE, size: range.size - 81920 - PAGE };
        for other in [before, behind] {
            empty(&victim, other, false).assert_done();
        }
        let answer = empty(&victim, range, true);
        answer.assert_done();
        assert_eq!(
            answer.reply.outcome,
            Some(Outcome::Empty(EmptyReply { discarded: vec![range] })),
            "{kind} {touched}"
        );
        empty(&victim, range, false).assert_done();
        assert_eq!(victim.ask("read 81920"), "byte 0", "{kind} {touched}");
        drop(victim);
        // The next victim makes the file again.
        let _ = std::fs::remove_file(file.trim_start_matches("file:"));
    }
}

#[test]
fn locked_memory_is_discarded_as_well() {
    let (victim, range) = victim_with("anonymous", SIZE, &["lock", "0", "4096"]);
    let answer = empty(&victim, range, true);
    answer.assert_done();
    assert_eq!(answer.reply.calls[0].name, "madvise");
    victim.assert_undisturbed();
}

#[test]
fn huge_pages_are_described_and_discarded_as_a_whole() {
    if huge_pages_free() < 2 {
        return println!(
            "huge_pages_are_described_and_discarded_as_a_whole: skipped, fewer than 2 free (vm.nr_hugepages)"
        );
    }
    let (victim, range) = victim_with("huge memfd", 2 * HUGE, &["0"]);
    let (described, _) = describe(&victim, range, OpenBacking::Unspecified);
    assert_eq!((described.mappings[0].kind(), described.mappings[0].page_size), (MappingKind::Hugetlbfs, HUGE));
    empty(&victim, range, false).assert_error(ReachErrorCode::NotEmpty);
    let cut = HvaRange { size: PAGE, ..range };
    empty(&victim, cut, true).assert_error(ReachErrorCode::Backing);
    empty(&victim, range, true).assert_done();
    victim.assert_undisturbed();
}

#[test]
fn a_file_on_a_disk_is_refused() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (victim, range) = victim_with(&format!("file:{}", directory.path().join("ram").display()), SIZE, &[]);
    let (described, _) = describe(&victim, range, OpenBacking::Unspecified);
    if described.mappings[0].kind() == MappingKind::Tmpfs {
        return println!("a_file_on_a_disk_is_refused: skipped, the build directory is on a tmpfs");
    }
    assert_eq!(described.mappings[0].kind(), MappingKind::File);
    assert_eq!(empty(&victim, range, true).assert_error(ReachErrorCode::Backing).address, Some(range.start));
}

#[test]
fn mappings_are_described_by_kind() {
    let (_directory, file) = tmpfs_file();
    for (kind, expected, shared) in [
        ("anonymous", MappingKind::Anonymous, false),
        ("shared", MappingKind::Tmpfs, true),
        ("memfd", MappingKind::Memfd, true),
        ("private memfd", MappingKind::Memfd, false),
        (&file, MappingKind::Tmpfs, true),
    ] {
        let (victim, range) = victim_with(kind, SIZE, &[]);
        let inner = HvaRange { start: range.start + PAGE, size: PAGE };
        let (described, _) = describe(&victim, inner, OpenBacking::Unspecified);
        let [mapping] = described.mappings.as_slice() else { panic!("{described:?}") };
        assert_eq!((mapping.start, mapping.size, mapping.page_size), (inner.start, PAGE, PAGE), "{kind}");
        assert_eq!((mapping.kind(), mapping.shared), (expected, shared), "{kind}");
        assert_eq!(mapping.offset, if expected == MappingKind::Anonymous { 0 } else { PAGE }, "{kind}");
        assert_eq!(mapping.descriptor_in_process.is_some(), kind != "anonymous" && kind != "shared", "{kind}");
    }
}

#[test]
fn the_file_of_a_mapping_is_handed_over() {
    for arguments in [vec!["4096"], vec!["4096", "close"]] {
        if arguments.len() > 1 && !is_root("the_file_of_a_mapping_is_handed_over after the process closed it") {
            continue;
        }
        let (mut victim, range) = victim_with("memfd", SIZE, &arguments);
        let (described, answer) = describe(&victim, range, OpenBacking::ReadWrite);
        assert_eq!(described.mappings[0].descriptor, Some(0));
        let file = std::fs::File::from(answer.descriptors.into_iter().next().unwrap());
        let mut byte = [0];
        file.read_exact_at(&mut byte, 4096).unwrap();
        assert_eq!(&byte, b"x");
        file.write_all_at(b"y", 4096).unwrap();
        assert_eq!(victim.ask("read 4096"), format!("byte {}", b'y'));
        let (_, answer) = describe(&victim, range, OpenBacking::Read);
        let file = std::fs::File::from(answer.descriptors.into_iter().next().unwrap());
        assert!(file.write_all_at(b"z", 4096).is_err(), "open for reading alone");
    }
}

#[test]
fn threads_are_found_by_the_ids_of_their_namespace() {
    let (victim, _) = victim_with("anonymous", PAGE, &[]);
    let own = victim.pid().cast_unsigned();
    let request = DescribeRequest { ranges: vec![], threads: vec![own, 1], open_backing: 0 };
    let answer = reach(&Named::of_victim(&victim), Operation::Describe(request));
    let Some(Outcome::Describe(described)) = answer.reply.outcome else { panic!("{answer:?}") };
    let found: Vec<_> = described.threads.iter().map(|thread| (thread.thread, thread.host_thread)).collect();
    assert_eq!(found, [(own, own), (1, 0)]);
    assert_eq!(described.namespaced_pids, [own]);
}

#[test]
fn small_ranges_are_read() {
    let (victim, range) = victim_with("anonymous", SIZE, &["4096", "8200"]);
    let ranges = vec![HvaRange { size: PAGE, ..range }, HvaRange { start: range.start + PAGE, size: 2 * PAGE }];
    let answer = reach(&Named::of_victim(&victim), Operation::ReadMemory(ReadMemoryRequest { ranges }));
    answer.assert_done();
    let Some(Outcome::ReadMemory(read)) = answer.reply.outcome else { panic!() };
    assert_eq!(read.contents[0], vec![0; 4096]);
    let set: Vec<_> = read.contents[1].iter().enumerate().filter(|(_, byte)| **byte != 0).map(|(at, _)| at).collect();
    assert_eq!(set, [0, 8200 - 4096]);
    victim.assert_undisturbed();
}

#[test]
fn an_unreadable_page_is_named() {
    let (victim, range) = victim_with("anonymous", SIZE, &["0"]);
    let beyond = HvaRange { start: range.start, size: 1 << 40 };
    let read =
        |range| reach(&Named::of_victim(&victim), Operation::ReadMemory(ReadMemoryRequest { ranges: vec![range] }));
    read(beyond).assert_error(ReachErrorCode::Invalid);
    let unmapped = read(HvaRange { start: PAGE, size: PAGE });
    assert_eq!(unmapped.assert_error(ReachErrorCode::NotMapped).address, Some(PAGE));
    victim.assert_undisturbed();
}
