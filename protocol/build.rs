//! Generates the Rust messages and services from `proto/` without an installed protoc.

use std::error::Error;

const FILES: [&str; 5] = [
    "proto/node.proto",
    "proto/discovery.proto",
    "proto/workload.proto",
    "proto/authorization.proto",
    "proto/certificate.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"])?;
    tonic_prost_build::configure()
        .codec_path("crate::SparingCodec")
        .bytes(".istio.workload.Workload.addresses")
        // In order, so that equal workloads are equal bytes.
        .btree_map(".istio.workload.Workload.services")
        .compile_fds(descriptors)?;
    Ok(())
}
