use super::*;
use clap::CommandFactory;

#[test]
fn the_command_line_is_sound() {
    Command::command().debug_assert();
}
