//! The program itself: what it says, and how it ends, when something that it needs is missing.
#![allow(clippy::unwrap_used, reason = "this is a test")]

use std::process::{Command, Output};

fn agent(arguments: &[&str], path: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ambit-node-agent"))
        .args(arguments)
        .env_clear()
        .env("PATH", path)
        .output()
        .unwrap()
}

fn fails_with(output: &Output, part: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(part), "{said}");
}

#[test]
fn without_iptables_it_ends_with_the_name_of_the_missing_program() {
    fails_with(
        &agent(&["cleanup"], "/nonexistent"),
        "iptables-nft-save is missing: install the package iptables",
    );
}

#[test]
fn without_the_nodes_name_it_ends_with_the_name_of_the_setting() {
    fails_with(
        &agent(&[], "/usr/sbin:/usr/bin"),
        "set NODE_NAME or --node-name",
    );
}

#[test]
fn without_a_cluster_it_ends_and_says_where_it_looked() {
    fails_with(
        &agent(&["--node-name=node-1"], "/usr/sbin:/usr/bin"),
        "find the API server",
    );
}

#[test]
fn without_its_rights_it_ends_with_the_names_of_the_missing_capabilities() {
    let output = Command::new("setpriv")
        .args(["--inh-caps", "-net_admin,-sys_admin"])
        .args(["--bounding-set", "-net_admin,-sys_admin"])
        .args([env!("CARGO_BIN_EXE_ambit-node-agent"), "cleanup"])
        .output()
        .unwrap();
    fails_with(&output, "the agent lacks NET_ADMIN, SYS_ADMIN:");
}
