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
