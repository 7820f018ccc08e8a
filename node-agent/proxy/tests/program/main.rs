//! The program itself, in a network namespace of its own, against an agent and a controller that say
//! what a test wants.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "these are tests"
)]

mod agent;
mod controller;
mod program;

use std::time::Duration;

use agent::Agent;
use controller::{Controller, authorization, resource, workload};
use nix::sys::signal::Signal;
use program::{Program, in_namespace};
use protocol::node::{Duty, Report, WorkloadState};
use protocol::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

const UID: &str = "11111111-2222-3333-4444-555555555555";
const IDENTITY: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// A proxy with its agent and its controller, ready.
async fn ready(program: &Program) -> (Agent, Controller) {
    let mut controller = Controller::start(program).await;
    let mut agent = Agent::start(program).await;
    let hello = agent.hello().await;
    assert_eq!(hello.pod_uid, "proxy-uid");
    agent.configure(1, &[(UID, "web", "10.1.0.1")]).await;
    controller
        .accept(&[(ADDRESS_TYPE, vec![workload(UID, "web", "10.1.0.1")])])
        .await;
    controller.accept(&[(AUTHORIZATION_TYPE, vec![])]).await;
    agent
        .report_where(|report| {
            report
                .workloads
                .iter()
                .all(|w| w.state() == WorkloadState::Ready)
        })
        .await;
    (agent, controller)
}

#[test]
fn it_becomes_ready_when_agent_and_controller_have_spoken() {
    in_namespace(async |program| {
        let mut controller = Controller::start(program).await;
        let missing = program.get(15021, "/healthz/ready").await;
        assert!(missing.starts_with("HTTP/1.1 500"), "{missing}");
        for part in [
            "agent is not connected",
            "listener",
            "received from the controller",
        ] {
            assert!(missing.contains(part), "{missing}");
        }
        let mut agent = Agent::start(program).await;
        agent.hello().await;
        agent
            .configure(7, &[(UID, "web", "10.1.0.1"), ("bad", "web", "nowhere")])
            .await;
        let report = agent.report().await;
        assert_eq!(report.generation, 7);
        let bound: Vec<_> = report
            .listeners
            .iter()
            .map(|one| (one.port, &*one.error))
            .collect();
        assert_eq!(bound, [(15001, ""), (15008, ""), (15006, "")]);
        let state_of = |uid: &str, report: &protocol::node::Report| {
            let found = report
                .workloads
                .iter()
                .find(|workload| workload.uid == uid)
                .unwrap();
            (found.state(), found.message.clone())
        };
        assert_eq!(state_of(UID, &report).0, WorkloadState::Pending);
        let (state, message) = state_of("bad", &report);
        assert_eq!(state, WorkloadState::Failed);
        assert_eq!(message, "\"nowhere\" is no address");

        controller
            .accept(&[(ADDRESS_TYPE, vec![workload(UID, "web", "10.1.0.1")])])
            .await;
        controller.accept(&[(AUTHORIZATION_TYPE, vec![])]).await;
        agent
            .report_where(|report| state_of(UID, report).0 == WorkloadState::Ready)
            .await;
        assert_eq!(controller.signed(), [IDENTITY]);
        let ready = program.get(15021, "/healthz/ready").await;
        assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");

        let dump = program.get_json(15000, "/config_dump").await;
        assert_eq!(dump["workloads"][0]["uid"], UID);
        assert_eq!(dump["workloads"][0]["protocol"], "HBONE");
        let certificate = &dump["certificates"][0];
        assert_eq!(certificate["identity"], IDENTITY);
        assert_eq!(certificate["state"], "Available");
        assert!(certificate["certChain"][0]["pem"].is_string());
        let metrics = program.get(15020, "/metrics").await;
        assert!(metrics.contains("ambit_proxy_ready 1"), "{metrics}");
        assert!(metrics.contains("istio_tcp_sockets_open 0"), "{metrics}");
    });
}

#[test]
fn it_serves_both_families() {
    in_namespace(async |program| {
        let mut controller = Controller::start(program).await;
        let mut agent = Agent::start(program).await;
        agent.hello().await;
        agent
            .configure(1, &[(UID, "web", "10.1.0.1,fd00:1::1")])
            .await;
        let both = workload(UID, "web", "10.1.0.1,fd00:1::1");
        controller.accept(&[(ADDRESS_TYPE, vec![both])]).await;
        let report = agent.report().await;
        assert!(report.listeners.iter().all(|one| one.error.is_empty()));
        for ip in ["127.0.0.1", "::1"] {
            for port in [15001, 15006, 15008, 15020, 15021] {
                assert!(program.listens_at(ip, port).await, "{ip} {port}");
            }
        }
        assert!(!program.listens_at("::1", 15000).await, "admin is local");
        let dump = program.get_json(15000, "/config_dump").await;
        let ips = serde_json::json!(["10.1.0.1", "fd00:1::1"]);
        assert_eq!(dump["localWorkloads"][0]["ips"], ips);
        assert_eq!(dump["workloads"][0]["workloadIps"], ips);
    });
}

#[test]
fn a_bad_resource_is_refused_by_name_and_the_rest_is_taken() {
    in_namespace(async |program| {
        let (_agent, mut controller) = ready(program).await;
        let resources = vec![
            workload("good", "web", "10.1.0.2"),
            workload("bad", "no account!", "10.1.0.3"),
        ];
        controller.send(ADDRESS_TYPE, resources, &[]).await;
        let answer = controller.answer().await;
        let detail = answer.error_detail.expect("a NACK");
        assert!(detail.message.starts_with("bad: "), "{}", detail.message);
        let dump = program.get_json(15000, "/config_dump").await;
        let uids: Vec<_> = dump["workloads"]
            .as_array()
            .unwrap()
            .iter()
            .map(|w| &w["uid"])
            .collect();
        assert_eq!(uids, [UID, "good"]);
    });
}

#[test]
fn without_a_controller_the_last_state_stays_and_a_new_stream_names_it() {
    in_namespace(async |program| {
        let (_agent, controller) = ready(program).await;
        controller.stop().await;
        program
            .logs("no controller; the directory stays as it is")
            .await;
        let mut controller = Controller::start(program).await;
        let dump = program.get_json(15000, "/config_dump").await;
        assert_eq!(dump["workloads"][0]["uid"], UID);
        let asked = controller.requests(2).await;
        let versions = &asked[ADDRESS_TYPE].initial_resource_versions;
        assert_eq!(versions.get(UID).map(String::as_str), Some("1"));
        let node = asked[ADDRESS_TYPE].node.clone().unwrap();
        assert_eq!(
            node.id,
            "ztunnel~10.3.0.1~proxy-1.ambit-system~ambit-system.svc.cluster.local"
        );
        let ready = program.get(15021, "/healthz/ready").await;
        assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");
    });
}

#[test]
fn without_a_controller_metrics_say_until_when_its_certificates_hold() {
    in_namespace(async |program| {
        let (_agent, controller) = ready(program).await;
        program
            .says_metric("ambit_proxy_discovery_connected", "1")
            .await;
        controller.stop().await;
        program
            .says_metric("ambit_proxy_discovery_connected", "0")
            .await;
        let expiry =
            format!("ambit_proxy_certificate_expiry_timestamp_seconds{{identity=\"{IDENTITY}\"}}");
        let said = program.metric(&expiry).await.expect("an expiry");
        let dump = program.get_json(15000, "/config_dump").await;
        let pem = dump["certificates"][0]["certChain"][0]["pem"].as_str();
        assert_eq!(said, program::end_of(pem.unwrap()));
    });
}

#[test]
fn without_an_agent_it_serves_on_and_reports_again_to_the_next() {
    in_namespace(async |program| {
        let (agent, _controller) = ready(program).await;
        agent.stop();
        let mut agent = Agent::start(program).await;
        agent.hello().await;
        assert!(program.listens(15001).await && program.listens(15008).await);
        agent.configure(2, &[(UID, "web", "10.1.0.1")]).await;
        let report = agent.report().await;
        assert_eq!(report.generation, 2);
        assert_eq!(
            report.workloads[0].state(),
            WorkloadState::Ready,
            "it kept its certificate"
        );
    });
}

#[test]
fn a_port_that_is_taken_is_reported_and_bound_as_soon_as_it_is_free() {
    in_namespace(async |program| {
        let taken = tokio::net::TcpListener::bind("0.0.0.0:15008")
            .await
            .unwrap();
        let _controller = Controller::start(program).await;
        let mut agent = Agent::start(program).await;
        agent.hello().await;
        agent.configure(1, &[]).await;
        let report = agent.report().await;
        assert!(report.listeners[1].error.contains("in use"), "{report:?}");
        drop(taken);
        agent
            .report_where(|report| report.listeners[1].error.is_empty())
            .await;
    });
}

#[test]
fn a_policy_that_cannot_be_read_is_refused_and_denies() {
    in_namespace(async |program| {
        let (_agent, mut controller) = ready(program).await;
        let policy = resource("shop/p", AUTHORIZATION_TYPE, &authorization("p", 77));
        controller.send(AUTHORIZATION_TYPE, vec![policy], &[]).await;
        assert!(controller.answer().await.error_detail.is_some());
        let dump = program.get_json(15000, "/config_dump").await;
        assert_eq!(dump["policies"][0]["action"], "Allow");
        assert_eq!(
            dump["policies"][0]["rules"].as_array().map(Vec::len),
            Some(0)
        );
    });
}

#[test]
fn sigterm_ends_it_with_success() {
    in_namespace(async |program| {
        let _parts = ready(program).await;
        program.signal(Signal::SIGTERM);
        let status = tokio::time::timeout(Duration::from_secs(5), program.ended())
            .await
            .unwrap();
        assert!(status.success(), "{status}");
        let log = program.log();
        assert!(log.contains("drained"), "{log}");
    });
}

#[test]
fn it_is_ready_only_while_new_connections_come_to_it() {
    in_namespace(async |program| {
        let (mut agent, _controller) = ready(program).await;
        agent
            .configure_for(Duty::Standby, 2, &[(UID, "web", "10.1.0.1")])
            .await;
        agent.report_where(|report| report.generation == 2).await;
        let missing = program.get(15021, "/healthz/ready").await;
        assert!(missing.contains("to another proxy"), "{missing}");
        // An agent that has just started has not decided yet.
        agent.configure(3, &[(UID, "web", "10.1.0.1")]).await;
        agent.report_where(|report| report.generation == 3).await;
        agent
            .configure_for(Duty::Unspecified, 4, &[(UID, "web", "10.1.0.1")])
            .await;
        agent.report_where(|report| report.generation == 4).await;
        let ready = program.get(15021, "/healthz/ready").await;
        assert!(ready.ends_with("ready\n"), "{ready}");
    });
}

/// Sends SIGTERM while a connection is open, which makes the drain last: it waits for its handshake.
async fn told_to_end(program: &Program) -> tokio::net::TcpStream {
    let open = tokio::net::TcpStream::connect("10.1.0.1:15008");
    let open = open.await.unwrap();
    program.signal(Signal::SIGTERM);
    open
}

/// Whether each listener's error is such a one.
fn every_listener(report: &Report, is_such: impl Fn(&str) -> bool) -> bool {
    report
        .listeners
        .iter()
        .all(|listener| is_such(&listener.error))
}

#[test]
fn a_proxy_that_ends_listens_until_another_serves() {
    in_namespace(async |program| {
        let (mut agent, _controller) = ready(program).await;
        let _open = told_to_end(program).await;
        let report = agent.report_where(|report| report.ending).await;
        let bound = every_listener(&report, str::is_empty);
        assert!(bound && program.listens(15001).await, "{report:?}");
        agent
            .configure_for(Duty::Standby, 2, &[(UID, "web", "10.1.0.1")])
            .await;
        agent
            .report_where(|report| every_listener(report, |error| !error.is_empty()))
            .await;
        while program.listens(15001).await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        program.logs("new connections go to another proxy").await;
    });
}

#[test]
fn while_it_drains_it_says_so_and_opens_nothing_again() {
    in_namespace(async |program| {
        let (mut agent, _controller) = ready(program).await;
        let _open = told_to_end(program).await;
        let ending =
            |report: &Report| every_listener(report, |error| error == "the proxy is ending");
        agent.report_where(ending).await;
        agent.configure(2, &[(UID, "web", "10.1.0.1")]).await;
        let report = agent.report().await;
        assert!(report.generation == 2 && ending(&report), "{report:?}");
        assert!(!program.listens(15001).await);
    });
}
