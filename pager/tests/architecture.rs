//! The architecture of the pager, held against its sources. Imports go down the layers, and rooms of a side form no circle.
//! No module is long, and unsafe code is in `sys` only.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Top-level modules from the bottom up. A module may import from every row below its own, and from no other.
const LAYERS: [&[&str]; 11] = [
    &["proto"],
    &["layout"],
    &["sys", "event_log"],
    &["lane", "sched", "vmm"],
    &["tuning"],
    &["source", "destination"],
    &["pager_error"],
    &["pager"],
    &["server"],
    &["program"],
    &["internals"],
];

const MAX_LINES: usize = 500;

/// A source file that is no test.
struct Source {
    /// Relative to `src`.
    path: PathBuf,
    /// Without comments.
    code: String,
}

impl Source {
    /// Names of its modules, from the top-level one down; `mod.rs` has none of its own.
    fn modules(&self) -> Vec<String> {
        let stem = self.path.with_extension("");
        stem.iter().map(|part| part.to_string_lossy().into_owned()).filter(|part| part != "mod").collect()
    }

    fn top(&self) -> String {
        self.modules()[0].clone()
    }

    /// The names behind each `prefix::` in the code, as far as they are modules: lower case.
    fn names_behind(&self, prefix: &str) -> BTreeSet<String> {
        let names = self.code.match_indices(prefix).map(|(at, _)| {
            let rest = &self.code[at + prefix.len()..];
            let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap_or(rest.len());
            rest[..end].to_owned()
        });
        names.filter(|name| !name.is_empty()).collect()
    }
}

fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
}

fn all_files() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    files(&root, &mut found);
    found.sort();
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).unwrap();
        (path.strip_prefix(&root).unwrap().to_path_buf(), text)
    };
    found.into_iter().map(read).collect()
}

fn sources() -> Vec<Source> {
    let is_test = |path: &Path| path.ends_with("tests.rs") || path == Path::new("sys/testing.rs");
    let files = all_files().into_iter().filter(|(path, _)| !is_test(path) && path != Path::new("lib.rs"));
    let code =
        |text: String| text.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n");
    files.map(|(path, text)| Source { path, code: code(text) }).collect()
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|row| row.contains(&module))
}

#[test]
fn every_module_has_a_layer() {
    let modules: BTreeSet<String> = sources().iter().map(Source::top).collect();
    let layers: BTreeSet<String> = LAYERS.iter().flat_map(|row| row.iter().map(|name| (*name).to_owned())).collect();
    let generated = BTreeSet::from(["proto".to_owned()]);
    assert_eq!(modules.union(&generated).cloned().collect::<BTreeSet<_>>(), layers);
}

#[test]
fn imports_go_down_the_layers() {
    let mut upward = Vec::new();
    for source in sources() {
        let own = source.top();
        for name in source.names_behind("crate::") {
            if name != own && layer(&name) >= layer(&own) {
                upward.push(format!("{} imports crate::{name}", source.path.display()));
            }
        }
    }
    assert!(upward.is_empty(), "{}", upward.join("\n"));
}

/// Rooms of a folder and the rooms that each imports; `mod.rs` is the room "mod".
fn rooms(folder: &str) -> BTreeMap<String, BTreeSet<String>> {
    let sources: Vec<_> = sources().into_iter().filter(|source| source.top() == folder).collect();
    let room = |source: &Source| source.modules().get(1).cloned().unwrap_or_else(|| "mod".into());
    let names: BTreeSet<String> = sources.iter().map(room).collect();
    let mut arrows: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in &sources {
        let own = room(source);
        let mut imported = source.names_behind(&format!("crate::{folder}::"));
        if source.modules().len() <= 2 && !source.path.ends_with("mod.rs") {
            imported.extend(source.names_behind("super::"));
        }
        if own == "mod" {
            imported.extend(names.iter().filter(|name| source.code.contains(&format!("{name}::"))).cloned());
        }
        // A name with a capital letter is of `mod.rs` itself.
        let of_mod = source.code.match_indices(&format!("crate::{folder}::")).any(|(at, prefix)| {
            source.code[at + prefix.len()..].starts_with(|c: char| c.is_ascii_uppercase() || c == '{')
        });
        imported.extend(of_mod.then(|| "mod".to_owned()));
        arrows
            .entry(own.clone())
            .or_default()
            .extend(imported.into_iter().filter(|name| names.contains(name) && *name != own));
    }
    arrows
}

/// A walk along the arrows that comes back to a room of it.
fn circle(arrows: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    fn walk(arrows: &BTreeMap<String, BTreeSet<String>>, way: &mut Vec<String>, done: &mut BTreeSet<String>) -> bool {
        let Some(here) = way.last().cloned() else { return false };
        for next in arrows.get(&here).into_iter().flatten() {
            if way.contains(next) {
                way.push(next.clone());
                return true;
            }
            if !done.contains(next) {
                way.push(next.clone());
                if walk(arrows, way, done) {
                    return true;
                }
                way.pop();
            }
        }
        done.insert(here);
        false
    }
    let mut done = BTreeSet::new();
    arrows.keys().find_map(|room| {
        let mut way = vec![room.clone()];
        walk(arrows, &mut way, &mut done).then_some(way)
    })
}

#[test]
fn rooms_form_no_circle() {
    for folder in ["destination", "lane", "layout", "sched", "server", "source", "sys", "vmm"] {
        let arrows = rooms(folder);
        assert!(arrows.len() > 1, "{folder} has no rooms");
        assert_eq!(circle(&arrows), None, "{folder}");
    }
}

#[test]
fn a_circle_is_found() {
    let arrows = |pairs: &[(&str, &str)]| {
        let mut arrows: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (from, to) in pairs {
            arrows.entry((*from).into()).or_default().insert((*to).into());
        }
        arrows
    };
    assert_eq!(circle(&arrows(&[("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")])), None);
    assert!(circle(&arrows(&[("a", "b"), ("b", "c"), ("c", "b")])).is_some());
}

#[test]
fn no_module_is_long() {
    let long = |(path, text): &(PathBuf, String)| {
        let lines = text.lines().count();
        (lines > MAX_LINES).then(|| format!("{}: {lines} lines", path.display()))
    };
    let found: Vec<_> = all_files().iter().filter_map(long).collect();
    assert!(found.is_empty(), "more than {MAX_LINES} lines:\n{}", found.join("\n"));
}

#[test]
fn unsafe_code_is_where_it_may_be() {
    let all = all_files();
    let library = all.iter().find(|(path, _)| path == Path::new("lib.rs")).map(|(_, text)| text.as_str()).unwrap();
    assert!(library.contains("#![deny(unsafe_code)]"));
    let mut allowed = BTreeSet::new();
    for (path, text) in &all {
        for (_, rest) in
            text.match_indices("#[allow(unsafe_code)]\n").map(|(at, found)| text.split_at(at + found.len()))
        {
            let line = rest.lines().next().unwrap_or("");
            let module = line.split("mod ").nth(1).unwrap_or_else(|| panic!("{}: {line}", path.display()));
            let folder = path.parent().unwrap();
            allowed.insert(folder.join(module.trim_end_matches(';')).to_string_lossy().into_owned());
        }
        assert!(!text.contains("#![allow(unsafe_code)]"), "{}", path.display());
    }
    assert_eq!(allowed, BTreeSet::from(["sys".to_owned()]));
}
