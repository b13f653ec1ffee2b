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
mod tests {
    use super::*;

    const SCRIPT: &str = "\
urgent 10/11 100.1:    1003009 cpu-clock: \n\
\tffffffff82 copy_user+0x7 ([kernel.kallsyms])\n\
\t    55aa00 vmferry_pager::send+0x1 (/usr/bin/vmferry-pager)\n\
\n\
urgent 10/11 100.2:    1003009 cpu-clock: \n\
\tffffffff82 copy_user+0x7 ([kernel.kallsyms])\n\
\t    55aa00 vmferry_pager::send+0x1 (/usr/bin/vmferry-pager)\n\
\n";

    #[test]
    fn stacks_are_folded_and_drawn() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        std::fs::write(path("script"), SCRIPT).unwrap();
        draw(&path("script"), &path("a.svg"), &path("a.folded"), "a title").unwrap();
        let folded = std::fs::read_to_string(path("a.folded")).unwrap();
        assert_eq!(folded, "urgent;vmferry_pager::send;copy_user 2006018\n");
        let svg = std::fs::read_to_string(path("a.svg")).unwrap();
        assert!(svg.contains("a title") && svg.contains("copy_user"), "{svg}");
    }
}
