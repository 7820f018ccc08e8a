//! ambit-node-agent. All of it is in the library, where fuzz targets reach it too.

use std::process::ExitCode;

// The allocator stays the system's: the ipset crate frees with it what libipset's side allocated with
// malloc.
fn main() -> ExitCode {
    node_agent::main()
}
