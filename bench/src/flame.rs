//! Flame graphs of the output of `perf script`.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use inferno::collapse::Collapse;
use inferno::collapse::perf::{Folder, Options as Folding};
use inferno::flamegraph::{self, Options};

/// Writes one flame graph as SVG, and its stacks as lines of `frame;frame;frame NS`: a sample stands for the time since the
/// one before.
///
/// # Errors
/// A file cannot be read or written, or there is no stack in it.
pub fn draw(script: &Path, svg: &Path, folded: &Path, title: &str) -> io::Result<()> {
    let mut lines = Vec::new();
    Folder::from(Folding::default()).collapse_file(Some(script), &mut lines)?;
    File::create(folded)?.write_all(&lines)?;
    let mut options = Options::default();
    options.title = title.into();
    options.count_name = "ns".into();
    flamegraph::from_reader(&mut options, &lines[..], BufWriter::new(File::create(svg)?)).map_err(io::Error::other)
}

#[cfg(test)]
mod tests;
