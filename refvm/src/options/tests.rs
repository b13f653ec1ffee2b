use super::*;
use clap::CommandFactory;

#[test]
fn the_command_line_is_sound() {
    Options::command().debug_assert();
    assert_eq!(bytes("512M"), Ok(512 << 20));
    assert_eq!(bytes("2G"), Ok(2 << 30));
    assert!(bytes("2T").is_err() && bytes("G").is_err() && bytes("99999999999999G").is_err());
    assert!(vm_name("web-1.a").is_ok() && vm_name("-x").is_err() && vm_name("").is_err());
}

#[test]
fn memory_is_said_in_the_words_of_the_protocol() {
    let options = |more: &[&str]| {
        let needed = ["x", "--vm", "a", "--daemon", "d", "--admin", "s"];
        Options::try_parse_from(needed.iter().chain(more)).map(|options| options.memory_of)
    };
    let huge = options(&["--page-size", "2M", "--backing", "memfd"]).unwrap();
    let said = serde_json::json!({"backing": "memfd", "page_size": 2 << 20});
    assert_eq!(serde_json::to_value(huge).unwrap(), said);
    assert_eq!(MadeOf::from(huge), MadeOf { backing: Backing::Memfd, page_size: 2 << 20 });
    let none = options(&[]).unwrap();
    assert!(!none.is_own() && serde_json::to_value(none).unwrap() == serde_json::json!({}));
    assert_eq!(MadeOf::from(none), Backing::Anonymous.into());
    assert!(options(&["--page-size", "8K"]).is_err() && options(&["--page-size", "1G"]).is_ok());
}

#[test]
fn a_failure_on_demand_happens_once() {
    let arguments = ["x", "--vm", "a", "--daemon", "d", "--admin", "s", "--fail-at", "save_state"];
    let mut options = Options::parse_from(arguments);
    assert!(!options.faults.fails_at(Verb::Stop));
    assert!(options.faults.fails_at(Verb::SaveState));
    assert!(!options.faults.fails_at(Verb::SaveState));
}
