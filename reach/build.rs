//! Generates the messages from `proto/`; the compiler is a Rust crate, so no `protoc` is needed.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = "../proto";
    println!("cargo:rerun-if-changed={root}");
    let descriptors = protox::compile(["vmferry/v1/reach.proto"], [root])?;
    prost_build::Config::new().compile_fds(descriptors)?;
    Ok(())
}
