//! ambit-controller. All of it is in the library, where fuzz targets reach it too.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    controller::main()
}
