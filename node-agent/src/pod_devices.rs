//! The devices that mesh pods' packets come in by, looked up once a pod.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use datapath::kernel::KernelError;
use datapath::netns::Netns;
use datapath::pod_devices::HostDevices;

use crate::desired::Pod;

/// What was found, by the pod's UID and address.
#[derive(Debug, Default)]
pub(crate) struct PodDevices(BTreeMap<(String, IpAddr), String>);

impl PodDevices {
    /// Looks for the pods that are new, or for all of them, and forgets those that are gone. Only IPv4
    /// has a setting of the device that matters.
    pub(crate) async fn look(
        &mut self,
        host: &Netns,
        pods: &[Pod],
        all: bool,
    ) -> Result<(), KernelError> {
        let wanted: BTreeSet<(String, IpAddr)> = pods
            .iter()
            .flat_map(|pod| pod.ips.iter().map(|ip| (pod.workload.uid.clone(), *ip)))
            .filter(|(_, ip)| ip.is_ipv4())
            .collect();
        if wanted.is_empty() {
            self.0.clear();
            return Ok(());
        }
        let host = HostDevices::list(host).await?;
        // The device of a pod that ends is gone before the pod is.
        self.0
            .retain(|key, device| !all && wanted.contains(key) && host.has(device));
        for key in wanted {
            if !self.0.contains_key(&key)
                && let Some(device) = host.towards(key.1).await?
            {
                self.0.insert(key, device);
            }
        }
        Ok(())
    }

    /// Their names.
    pub(crate) fn names(&self) -> BTreeSet<String> {
        self.0.values().cloned().collect()
    }
}
