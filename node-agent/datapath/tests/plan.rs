//! For whatever is wanted and whatever is there, the plan leads to what is wanted. What happens to
//! packets on its way is in `packets.rs`.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod any;
mod bed;

use any::{any_input, any_observed};
use datapath::kernel::recorded::RecordedKernel;
use datapath::names::Names;
use datapath::netns::Netns;
use datapath::{Datapath, Hold, Item, Kernel, PerSlot, Place, Slot, build, plan, with_holds};
use proptest::prelude::*;

fn holding(observed: &Datapath) -> RecordedKernel {
    let mut kernel = RecordedKernel::holding(observed.clone());
    for slot in Slot::BOTH {
        kernel.attach(slot, Netns::own()).unwrap();
    }
    kernel
}

/// Everything, so that settings of either are seen.
fn both(one: &Datapath, other: &Datapath) -> Datapath {
    Datapath {
        host: one.host.union(&other.host).cloned().collect(),
        proxies: PerSlot {
            first: one
                .proxies
                .first
                .union(&other.proxies.first)
                .cloned()
                .collect(),
            second: one
                .proxies
                .second
                .union(&other.proxies.second)
                .cloned()
                .collect(),
        },
    }
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(work)
}

proptest! {
    #[test]
    fn the_plan_reaches_what_is_wanted_from_anywhere(wanted in any_input(), observed in any_observed()) {
        let desired = build(&wanted);
        let kernel = holding(&observed);
        let interest = both(&desired, &observed);
        let seen = run(kernel.observe(&interest)).unwrap();
        run(kernel.apply(&plan(&desired, &seen))).unwrap();
        let seen = run(kernel.observe(&interest)).unwrap();
        let again = plan(&desired, &seen);
        prop_assert!(again.is_empty(), "there is still to do\n{again}");
        for place in Place::ALL {
            let missing: Vec<&Item> = desired.side(place).difference(seen.side(place)).collect();
            prop_assert!(missing.is_empty(), "{place:?} lacks {missing:?}");
        }
    }

    #[test]
    fn a_step_that_fails_leaves_a_state_from_which_the_next_plan_goes_on(
        wanted in any_input(), observed in any_observed(), failing in 0usize..40,
    ) {
        let desired = build(&wanted);
        let kernel = holding(&observed);
        let mut left = failing;
        kernel.fail_when(move |_| {
            left = left.wrapping_sub(1);
            (left == usize::MAX).then_some(datapath::kernel::KernelError::Detached)
        });
        let interest = both(&desired, &observed);
        for _ in 0..2 {
            let seen = run(kernel.observe(&interest)).unwrap();
            let _ = run(kernel.apply(&plan(&desired, &seen)));
        }
        let seen = run(kernel.observe(&interest)).unwrap();
        prop_assert!(plan(&desired, &seen).is_empty());
    }

    /// A new pod is held back until all else is done, and then it is let go.
    #[test]
    fn no_step_lets_go_of_a_held_pod_before_it_is_carried(from in any_input(), to in any_input()) {
        let holds = to.pods.iter().map(|pod| Hold { device: "veth".to_owned(), ip: pod.ip }).collect();
        let held = with_holds(build(&from), &holds, &Names::default());
        let steps = plan(&build(&to), &held).steps;
        let of_host = steps.iter().filter(|step| step.place == Place::Host);
        let after = of_host.skip_while(|step| !step.change.item().is_hold());
        let released: Vec<&Item> = after.map(|step| step.change.item()).collect();
        prop_assert!(released.iter().all(|item| item.is_hold()), "{released:?}");
        prop_assert_eq!(released.len(), holds.len());
    }
}
