//! What the agent knows of its host beside the data path: what the kernel can do, and what stands in
//! the way.

use std::path::PathBuf;

use datapath::attachment::Attachment;
use datapath::facts::{self, Earlier, Facts, Interest, Obstacle, Others, Severity};
use datapath::kernel::iptables::Dump;
use datapath::names::Names;
use datapath::netns::Netns;
use datapath::{Datapath, IptablesBackend};

use crate::desired::Wanted;
use crate::failure::{Complaint, Failure};

/// The host's side: where it is, and what of it is ours.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub(crate) netns: Netns,
    /// Where its `/proc/sys/net` can be written.
    pub(crate) sysctl_root: PathBuf,
    pub(crate) names: Names,
}

/// What was found when the agent looked last.
#[derive(Default)]
pub(crate) struct Survey {
    found: Option<(Facts, Others)>,
    /// What stands in the way, and the proxy's device when it was looked for.
    obstacles: Vec<Obstacle>,
    looked_at: Option<String>,
}

impl Survey {
    pub(crate) fn facts(&self) -> Option<&Facts> {
        self.found.as_ref().map(|(facts, _)| facts)
    }

    /// Finds out what the kernel can do and what others hold in it; what rarely changes only if this is
    /// a `full` pass, or while something has to go. `kept` is the backend that the status speaks of.
    /// Whether it has looked.
    pub(crate) async fn renew(
        &mut self,
        host: &Host,
        full: bool,
        kept: Option<IptablesBackend>,
    ) -> Result<bool, Failure> {
        if !full && self.found.is_some() && !self.is_hindered() {
            return Ok(false);
        }
        let earlier = Earlier {
            backend: self.facts().map(|facts| facts.iptables).or(kept),
            others: self.found.as_ref().map(|(_, others)| others),
        };
        let found = facts::find(&host.netns, &host.names, earlier)
            .await
            .map_err(|error| Failure::from(&error))?;
        self.found = Some(found);
        Ok(true)
    }

    /// What `iptables-save` printed.
    pub(crate) fn dumps(&self) -> impl Iterator<Item = Dump<'_>> {
        self.found.iter().flat_map(|(_, others)| others.dumps())
    }

    /// Finds out what stands in the way of what is wanted; if it is not `due`, only where it has to go
    /// or the proxy has another device.
    pub(crate) async fn look_out(
        &mut self,
        host: &Host,
        (wanted, draft): (&Wanted, &Datapath),
        attachment: Option<&Attachment>,
        due: bool,
    ) -> Result<(), Failure> {
        let device = attachment.map(|attachment| attachment.host_device.clone());
        let due = due || self.is_hindered() || self.looked_at != device;
        let (Some((facts, others)), true) = (&self.found, due) else {
            return Ok(());
        };
        let addresses = wanted.pods.iter().flat_map(|pod| &pod.ips);
        let interest = Interest {
            marks: &wanted.marks,
            desired: draft,
            device: device.as_deref(),
            ipv6: addresses.into_iter().any(|ip| ip.is_ipv6()),
        };
        let found = facts::obstacles(&host.netns, &host.sysctl_root, (facts, others), interest);
        self.obstacles = found.await.map_err(|error| Failure::from(&error))?;
        self.looked_at = device;
        Ok(())
    }

    /// Why nothing may be begun.
    pub(crate) fn forbids(&self) -> Option<Failure> {
        Failure::obstacles(&self.obstacles, Severity::Forbids)
    }

    /// Why the data path does not work where it stands.
    pub(crate) fn breaks(&self) -> Option<Failure> {
        Failure::obstacles(&self.obstacles, Severity::Breaks)
    }

    /// What might be in its way.
    pub(crate) fn warning(&self) -> Option<Complaint> {
        Complaint::of(&self.obstacles)
    }

    /// Something has to go before the data path works: it is looked for in every pass.
    fn is_hindered(&self) -> bool {
        let hinders = |obstacle: &Obstacle| obstacle.severity() != Severity::MayBreak;
        self.obstacles.iter().any(hinders)
    }
}
