//! Whose traffic stays held back. Pure, but for the reading of what it is decided from.
//!
//! ```text
//!  kernel ─▶ observed rules ─▶ records (after the rules: whoever makes a rule has written its record) ─▶ decide
//!     stays: a pod of a mesh namespace that is not enrolled yet
//!     goes:  enrolled · stays out of the mesh · its namespace left it · its device is gone · no record
//! ```

use std::collections::BTreeSet;
use std::path::Path;

use datapath::Hold;
use datapath::kernel::KernelError;
use datapath::netns::Netns;
use datapath::pod_devices::HostDevices;
use guard::record::{self, Record, RecordError};

use crate::desired::{Pod, Wanted};

/// What could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HoldsError {
    #[error(transparent)]
    Records(#[from] RecordError),
    #[error(transparent)]
    Devices(#[from] KernelError),
}

/// The records, by what is to become of them.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Holds {
    staying: Vec<Record>,
    going: Vec<Record>,
}

impl Holds {
    /// Reads the records, and decides. `enrolled` are the pods that the kernel will send to the proxy.
    pub(crate) async fn find(
        host: &Netns,
        records: &Path,
        wanted: Option<&Wanted>,
        enrolled: &[&Pod],
    ) -> Result<Self, HoldsError> {
        let records = record::all(records)?;
        if records.is_empty() {
            return Ok(Self::default());
        }
        let devices = HostDevices::list(host).await?;
        let (staying, going) = records.into_iter().partition(|record| {
            wanted.is_some_and(|wanted| stays(record, wanted, enrolled))
                && devices.has_index(record.index)
        });
        Ok(Self { staying, going })
    }

    /// What the kernel should hold for them.
    pub(crate) fn rules(&self) -> BTreeSet<Hold> {
        let of_one = |record: &Record| {
            let device = record.device.clone();
            let ips = record.addresses.clone().into_iter();
            ips.map(move |ip| Hold {
                device: device.clone(),
                ip,
            })
        };
        self.staying.iter().flat_map(of_one).collect()
    }

    /// Removes the records of those that the kernel holds no more: nobody is held twice, also when a
    /// running pod leaves the mesh and comes back.
    pub(crate) fn forget(&self, records: &Path) -> Result<(), RecordError> {
        self.going
            .iter()
            .try_for_each(|record| record.remove(records))
    }
}

fn stays(record: &Record, wanted: &Wanted, enrolled: &[&Pod]) -> bool {
    wanted.held_namespaces.contains(&record.namespace)
        && !wanted.outside.contains(&record.uid)
        && !enrolled.iter().any(|pod| is_carried(record, pod))
}

/// Whether an enrolled pod is this one at the addresses that it has now: after a reboot, or when its
/// sandbox is made anew, it may still be known by those it had before.
fn is_carried(record: &Record, pod: &Pod) -> bool {
    pod.workload.uid == record.uid && pod.ips.iter().all(|ip| record.addresses.contains(ip))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::parse;
    use crate::desired::tests::{spec, workload};

    fn record(uid: &str, namespace: &str) -> Record {
        Record {
            container: "c".to_owned(),
            interface: "eth0".to_owned(),
            network: "n".to_owned(),
            uid: uid.to_owned(),
            namespace: namespace.to_owned(),
            name: "web".to_owned(),
            index: 1,
            device: "veth1".to_owned(),
            addresses: ["10.0.0.4".parse().unwrap()].into(),
            priority: 99,
            protocol: 90,
        }
    }

    #[test]
    fn a_pod_stays_held_until_it_is_enrolled_or_known_to_stay_out() {
        let mut spec = spec(vec![workload("a", "10.0.0.4")]);
        spec.mesh_namespaces = vec!["shop".to_owned()];
        spec.outside = vec!["o".to_owned()];
        let wanted = parse(&spec).unwrap();
        let none = [];
        assert!(stays(&record("a", "shop"), &wanted, &none));
        assert!(stays(&record("not-told-of-yet", "shop"), &wanted, &none));
        assert!(!stays(&record("a", "shop"), &wanted, &[&wanted.pods[0]]));
        assert!(!stays(&record("o", "shop"), &wanted, &none));
        assert!(!stays(&record("a", "plain"), &wanted, &none));
        spec.failure_mode = crds::FailureMode::Open;
        let open = parse(&spec).unwrap();
        assert!(!stays(&record("a", "shop"), &open, &none));
    }

    #[test]
    fn a_pod_that_is_enrolled_at_the_address_it_had_before_a_reboot_stays_held() {
        let mut spec = spec(vec![workload("a", "10.0.0.3")]);
        spec.mesh_namespaces = vec!["shop".to_owned()];
        let wanted = parse(&spec).unwrap();
        let before = [&wanted.pods[0]];
        assert!(stays(&record("a", "shop"), &wanted, &before));
    }

    #[tokio::test]
    async fn what_is_let_go_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let mut spec = spec(vec![]);
        spec.mesh_namespaces = vec!["shop".to_owned()];
        let wanted = parse(&spec).unwrap();
        // The device of index 1 is lo, and there is none of this index.
        let gone = Record {
            container: "gone".to_owned(),
            index: u32::MAX,
            ..record("b", "shop")
        };
        record("a", "shop").write(folder.path()).unwrap();
        gone.write(folder.path()).unwrap();
        let host = Netns::own();
        let find = |wanted| Holds::find(&host, folder.path(), wanted, &[]);
        let holds = find(Some(&wanted)).await.unwrap();
        assert_eq!(holds.staying, [record("a", "shop")]);
        assert_eq!(holds.rules().len(), 1);
        holds.forget(folder.path()).unwrap();
        assert_eq!(record::all(folder.path()).unwrap(), [record("a", "shop")]);
        let nothing_wanted = find(None).await.unwrap();
        assert!(nothing_wanted.rules().is_empty());
        nothing_wanted.forget(folder.path()).unwrap();
        assert_eq!(record::all(folder.path()).unwrap(), []);
    }
}
