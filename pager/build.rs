//! Generates the gRPC code from `proto/`; the compiler is a Rust crate, so no `protoc` is needed.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = "../proto";
    let files = ["vmferry/v1/pager.proto", "vmferry/v1/pages.proto"];
    println!("cargo:rerun-if-changed={root}");
    let descriptors = protox::compile(files, [root])?;
    tonic_prost_build::configure().bytes(".vmferry.v1").compile_fds(descriptors)?;
    Ok(())
}
