//! From what is wanted to what the bed's kernel holds.

use std::path::PathBuf;

use datapath::names::Names;
use datapath::{Datapath, IptablesBackend, Kernel, LinuxKernel, NodeInput, Slot, build, plan};

use super::Bed;

pub(crate) const BACKENDS: [IptablesBackend; 2] = [IptablesBackend::Nft, IptablesBackend::Legacy];

/// The kernel of the bed, without a proxy.
pub(crate) fn kernel(bed: &Bed) -> LinuxKernel {
    kernel_of(bed, Names::default())
}

/// The kernel of an installation that calls its own so.
pub(crate) fn kernel_of(bed: &Bed, names: Names) -> LinuxKernel {
    LinuxKernel::in_namespace(
        bed.netns("host"),
        bed.backend,
        PathBuf::from("/proc/sys/net"),
        names,
    )
    .unwrap()
}

/// Brings the kernel to the desired state and checks that nothing is left to do.
pub(crate) async fn converge(kernel: &LinuxKernel, desired: &Datapath, interest: &Datapath) {
    let observed = kernel.observe(interest).await.unwrap();
    let steps = plan(desired, &observed);
    kernel.apply(&steps).await.unwrap();
    let observed = kernel.observe(interest).await.unwrap();
    let again = plan(desired, &observed);
    assert!(
        again.is_empty(),
        "after\n{steps}there is still to do\n{again}"
    );
}

/// The kernel with the bed's proxy attached, holding what `input` wants.
pub(crate) async fn attached(bed: &Bed, input: &NodeInput) -> LinuxKernel {
    let mut kernel = kernel_of(bed, input.names.clone());
    kernel.attach(Slot::First, bed.netns("proxy")).unwrap();
    let desired = build(input);
    converge(&kernel, &desired, &desired).await;
    kernel
}
