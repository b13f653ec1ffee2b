//! The pager program.

fn main() -> std::io::Result<()> {
    vmferry_pager::run()
}
