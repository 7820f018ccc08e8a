//! What the tests themselves put on a machine does not outlive them.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod bed;

use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bed::leftovers::{prefix, remove_those_of_the_dead};
use bed::{Bed, sh};
use datapath::IptablesBackend;

/// Set in the process that is killed, which runs the test again.
const KILLED: &str = "AMBIT_KILLED_BED";

#[test]
fn a_killed_test_leaves_no_namespace() {
    if std::env::var_os(KILLED).is_some() {
        let _bed = Bed::new(IptablesBackend::Nft);
        sh(&format!("kill -KILL {}", std::process::id()));
    }
    let mut killed = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_test_leaves_no_namespace"])
        .env(KILLED, "1")
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let prefix = prefix(killed.id());
    assert_eq!(killed.wait().unwrap().signal(), Some(9));
    let start = Instant::now();
    while sh("ip netns list").contains(&prefix) {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "its namespaces stay: {}",
            sh("ip netns list")
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn what_the_dead_left_is_removed_and_what_the_living_have_stays() {
    let mut dead = Command::new("true").spawn().unwrap();
    dead.wait().unwrap();
    let (left, kept) = (prefix(dead.id()) + "0-host", Bed::new(IptablesBackend::Nft));
    sh(&format!("ip netns add {left}"));
    remove_those_of_the_dead();
    let found = sh("ip netns list");
    assert!(!found.contains(&left), "{found}");
    assert!(found.contains(&kept.name("host")), "{found}");
}
