//! A namespace joins the mesh and leaves it while its pods talk all the time.

use std::time::Duration;

use anyhow::{Result, ensure};
use mesh_tests::cluster::Cluster;
use mesh_tests::enrolment::{enrol, withdraw};
use mesh_tests::load::report::Totals;
use mesh_tests::load::{Party, ensure_none_failed};
use mesh_tests::soak::{count, recorded};
use mesh_tests::state;
use mesh_tests::traffic::Proxies;
use serde::Serialize;

/// Long enough for some hundred connections.
const A_WHILE: Duration = Duration::from_secs(1);

#[derive(Default, Serialize)]
struct Numbers {
    rounds: usize,
    slowest_enrolment_ms: u128,
    #[serde(flatten)]
    traffic: Totals,
}

#[test]
fn no_connection_fails_while_a_namespace_joins_and_leaves_under_load() -> Result<()> {
    recorded("enrol_under_load", |chance, numbers: &mut Numbers| {
        let cluster = Cluster::current()?;
        cluster.wait_recovered()?;
        let party = Party::gather(&cluster, "joins", None)?;
        let name = party.namespace.name.as_str();
        let proxies = Proxies::find(&cluster)?;
        let ((), report) = party.under_load("joins", |_| {
            for _ in 0..count(3, 50) {
                let took = enrol(&cluster, name)?;
                numbers.slowest_enrolment_ms = numbers.slowest_enrolment_ms.max(took.as_millis());
                state::ensure_all_whole(&cluster)?;
                let ((), ways) = proxies.ways_of(name, || {
                    std::thread::sleep(A_WHILE / 2);
                    Ok(())
                })?;
                ensure!(
                    ways.iter().any(|way| way.ends_with(" mtls")),
                    "enrolled, and nothing goes through the mesh: {ways:?}"
                );
                std::thread::sleep(chance.moment(A_WHILE));
                withdraw(&cluster, name)?;
                state::ensure_all_whole(&cluster)?;
                std::thread::sleep(chance.moment(A_WHILE));
                numbers.rounds += 1;
            }
            Ok(())
        })?;
        numbers.traffic.take(&report);
        ensure_none_failed(&report)
    })
}
