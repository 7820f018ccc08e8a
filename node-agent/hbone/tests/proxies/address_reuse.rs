//! Addresses that one pod had and another gets.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use crate::bed::*;
use hbone::directory::Workload;
use hbone::policy::{Policy, PolicyScope};

#[test]
fn tunnels_go_with_their_workloads() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        serve_echo(SERVER, 8080).await;
        let mut open = dial(CLIENT, at(VIP, 80)).await.unwrap();
        greeted(&mut open, CLIENT).await;
        mesh.near
            .change(|directory| directory.remove_workload("server", Instant::now()));
        assert_eq!(mesh.near.shared.tunnels(), 0);
        assert_eq!(talk(open, "goes on").await.unwrap(), "goes on");
        // The address is another pod's now, with another identity.
        mesh.far
            .set_pods(&mesh.authority, [pod("other", SERVER)])
            .await;
        mesh.near
            .change(|directory| directory.put_workload(endpoint("other", SERVER)));
        let stream = dial(CLIENT, at(VIP, 80)).await.unwrap();
        assert_eq!(talk(stream, "x").await.unwrap(), greeting(CLIENT, "x"));
        assert_eq!(mesh.near.shared.tunnels(), 1);
    });
}

#[test]
fn the_address_of_a_pod_that_has_gone_is_reached_once_its_next_holder_is_known() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        serve_echo(SERVER, 8080).await;
        mesh.near
            .change(|directory| directory.remove_workload("server", Instant::now()));
        let refused = refusal(dial(CLIENT, at(SERVER, 8080)).await).await;
        assert_eq!(refused, ErrorKind::ConnectionReset);
        let dialled = tokio::spawn(dial(CLIENT, at(SERVER, 8080)));
        tokio::time::sleep(Duration::from_millis(300)).await;
        mesh.near
            .change(|directory| directory.put_workload(endpoint("server", SERVER)));
        let stream = dialled.await.unwrap().unwrap();
        assert_eq!(talk(stream, "x").await.unwrap(), greeting(CLIENT, "x"));
        assert_eq!(mesh.near.shared.tunnels(), 1);
    });
}

/// The first packets of what the proxies dial are lost until the rule is taken away.
fn lose_dials(change: &str) {
    for program in ["iptables", "ip6tables"] {
        run(&format!(
            "{program} {change} OUTPUT -p tcp --dport 8080 -m mark --mark 0 -j DROP"
        ));
    }
}

#[test]
fn who_was_let_in_to_one_pod_does_not_meet_another_that_gets_its_address_meanwhile() {
    in_namespace(async || {
        let mesh = Mesh::new().await;
        serve_echo(NEIGHBOUR, 8080).await;
        mesh.near
            .change(|directory| directory.put_workload(endpoint("neighbour", NEIGHBOUR)));
        lose_dials("-A");
        let waits = dial(CLIENT, at(NEIGHBOUR, 8080)).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        // Nothing is allowed.
        let closed = Policy {
            namespace: "shop".into(),
            scope: PolicyScope::Selected,
            ..Policy::default()
        };
        mesh.near.change(|directory| {
            directory.remove_workload("neighbour", Instant::now());
            directory.put_policy("shop/closed".into(), closed);
            directory.put_workload(Workload {
                policies: vec!["shop/closed".into()],
                ..endpoint("other", NEIGHBOUR)
            });
        });
        let pods = [pod("client", CLIENT), pod("other", NEIGHBOUR)];
        mesh.near.set_pods(&mesh.authority, pods).await;
        lose_dials("-D");
        assert_eq!(refusal(waits).await, ErrorKind::ConnectionReset);
    });
}
