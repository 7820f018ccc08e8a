//! How long a node takes that is full of pods and of other people's rules: prints the numbers, and
//! fails when one is over its limit.
//!
//! ```text
//!  from nothing   observe ▶ plan ▶ apply ▶ observe     the first pass of an agent
//!  one enrolment   glance ▶ plan ▶ apply ▶ glance      a pass because a pod came
//!  no change      survey ▶ observe ▶ plan              a full pass when all is well
//! ```
//!
//! The processors' time of a pass without change, iptables included, tells how dear it is where something
//! else keeps the machine busy.
#![allow(clippy::unwrap_used, reason = "this is a benchmark")]

#[path = "../tests/bed/mod.rs"]
mod bed;

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use bed::converge::{BACKENDS, kernel};
use bed::{Bed, dual, input_with, ipv6_of};
use datapath::facts::{self, Earlier, Interest, Others};
use datapath::{
    Datapath, IptablesBackend, Kernel, LinuxKernel, MeshPod, NodeInput, Slot, TunnelKind, build,
    plan,
};

/// Mesh pods of the node.
const PODS: u8 = 250;
/// Passes that a number is of.
const ROUNDS: usize = 40;

const FROM_NOTHING: Duration = Duration::from_secs(1);
const ENROLMENT: Duration = Duration::from_millis(20);
const NO_CHANGE: Duration = Duration::from_millis(50);

fn main() -> std::process::ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut all_within = true;
    for backend in BACKENDS {
        for is_dual in [false, true] {
            all_within &= runtime.block_on(measure(backend, is_dual));
        }
    }
    if all_within {
        std::process::ExitCode::SUCCESS
    } else {
        std::process::ExitCode::FAILURE
    }
}

async fn measure(backend: IptablesBackend, is_dual: bool) -> bool {
    let mut bed = if is_dual {
        Bed::dual(backend)
    } else {
        Bed::new(backend)
    };
    bed.occupy();
    bed.crowd(PODS);
    let input = |pods| of(pods, is_dual);
    let all = build(&input(PODS));
    let mut kernel = kernel(&bed);
    kernel.attach(Slot::First, bed.netns("proxy")).unwrap();

    let started = Instant::now();
    let observed = kernel.observe(&all).await.unwrap();
    kernel.apply(&plan(&all, &observed)).await.unwrap();
    let observed = kernel.observe(&all).await.unwrap();
    let from_nothing = started.elapsed();
    assert!(plan(&all, &observed).is_empty());

    let fewer = build(&input(PODS - 1));
    let mut enrolments = Vec::new();
    for _ in 0..ROUNDS {
        pass(&kernel, &fewer).await;
        enrolments.push(pass(&kernel, &all).await);
    }
    let mut idle = Vec::new();
    let mut others = None;
    let mut used_before = Duration::ZERO;
    for round in 0..=ROUNDS {
        // The first time, everything has changed.
        if round == 1 {
            used_before = used();
        }
        let started = Instant::now();
        others = Some(survey(&bed, &kernel, &input(PODS), others.as_ref()).await);
        let observed = kernel.observe(&all).await.unwrap();
        assert!(plan(&all, &observed).is_empty());
        idle.push(started.elapsed());
    }
    idle.remove(0);
    let used = (used() - used_before) / u32::try_from(ROUNDS).unwrap();

    let families = if is_dual { "IPv4 and IPv6" } else { "IPv4" };
    println!("{backend:?}, {families}: {PODS} pods, thousands of rules of others");
    println!("                   median     95 %  longest");
    let all_within = [
        within("from nothing", vec![from_nothing], 100, FROM_NOTHING),
        within("one enrolment", enrolments, 95, ENROLMENT),
        within("no change", idle, 100, NO_CHANGE),
    ]
    .iter()
    .all(|within| *within);
    let used = used.as_secs_f64() * 1000.0;
    println!("  {used:.1} ms of the processors for a pass without change");
    all_within
}

/// The processors' time of this process and of the programs that it has run.
fn used() -> Duration {
    const TICKS: u64 = 100;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // utime, stime, cutime, cstime of proc_pid_stat(5): the 14th to 17th, behind the name in brackets.
    let fields = stat.rsplit_once(") ").unwrap().1.split(' ');
    let ticks = fields
        .skip(11)
        .take(4)
        .map(|field| field.parse::<u64>().unwrap());
    Duration::from_millis(ticks.sum::<u64>() * (1000 / TICKS))
}

/// A pass as the agent makes it between full ones.
async fn pass(kernel: &LinuxKernel, desired: &Datapath) -> Duration {
    let started = Instant::now();
    let observed = kernel.glance(desired).await.unwrap();
    let steps = plan(desired, &observed);
    assert!(!steps.is_empty());
    kernel.apply(&steps).await.unwrap();
    let after = kernel.glance(desired).await.unwrap();
    let took = started.elapsed();
    assert!(plan(desired, &after).is_empty());
    took
}

/// Looks what others hold and whether that is in the way, as the agent does in full passes.
async fn survey(
    bed: &Bed,
    kernel: &LinuxKernel,
    input: &NodeInput,
    others: Option<&Others>,
) -> Others {
    let (host, root) = (bed.netns("host"), Path::new("/proc/sys/net"));
    let earlier = Earlier {
        backend: Some(bed.backend),
        others,
    };
    let (facts, others) = facts::find(&host, &input.names, earlier).await.unwrap();
    assert_eq!(facts.iptables, bed.backend);
    kernel.learn(others.dumps());
    let interest = Interest {
        marks: &input.marks,
        desired: &build(input),
        device: Some("vproxy"),
        ipv6: input.pods.iter().any(|pod| pod.ip.is_ipv6()),
    };
    let found = facts::obstacles(&host, root, (&facts, &others), interest).await;
    assert_eq!(found.unwrap(), []);
    others
}

fn of(pods: u8, is_dual: bool) -> NodeInput {
    let ips: Vec<Ipv4Addr> = (0..pods).map(bed::crowd::ip).collect();
    let pod = |ip: IpAddr| MeshPod { ip };
    let mut input = input_with(TunnelKind::Veth, 0);
    if is_dual {
        input = dual(input);
        input
            .pods
            .extend(ips.iter().map(|ip| pod(ipv6_of(*ip).into())));
    }
    input.pods.extend(ips.iter().map(|ip| pod((*ip).into())));
    input
}

/// Prints what passes took, and says whether so many of a hundred took less than the limit.
fn within(what: &str, mut times: Vec<Duration>, percent: usize, limit: Duration) -> bool {
    times.sort();
    let percentile = |percent: usize| times[(times.len() * percent).div_ceil(100) - 1];
    let shown = [50, 95, 100].map(|percent| percentile(percent).as_secs_f64() * 1000.0);
    let within = percentile(percent) < limit;
    let verdict = if within { "within" } else { "OVER" };
    println!(
        "  {what:14}{:8.1} {:8.1} {:8.1} ms  {verdict} {} ms",
        shown[0],
        shown[1],
        shown[2],
        limit.as_millis()
    );
    within
}
