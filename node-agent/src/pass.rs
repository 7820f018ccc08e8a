//! One pass over the node: what is wanted, what is there, the difference, and what came of it.
//!
//! ```text
//!  spec ─▶ survey ─▶ choose ─▶ attach ─▶ tell ─▶ mend (build, observe, plan, apply) ─▶ tell ─▶ outcome
//! ```

mod attach;
mod mend;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crds::AmbientNode;
use datapath::changes::Changes;
use datapath::facts::Facts;
use datapath::kernel::{Kernel, LinuxKernel};
use datapath::{Datapath, IptablesBackend, PerSlot, plan};
use protocol::node::{Configure, Duty, LocalTraffic, Workload};
use tokio::sync::mpsc;

use crate::cleanup::{self, CleanupError};
use crate::desired::{self, Pod, Wanted};
use crate::failure::Failure;
use crate::metrics::Metrics;
use crate::order::{self, Enrolment};
use crate::plugin::Plugin;
use crate::pod_devices::PodDevices;
use crate::report::{Outcome, ProxyState, WorkloadOutcome};
use crate::roster::{self, Progress, Roster};
use crate::survey::{Host, Survey};

use attach::Attached;
use mend::Progressed;

/// What the agent knows of its node from pass to pass.
pub(crate) struct Node {
    host: Host,
    plugin: Plugin,
    metrics: Arc<Metrics>,
    wake: mpsc::Sender<()>,
    started: Instant,
    /// The first change was made, or might have been.
    began: bool,
    survey: Survey,
    kernel: Option<LinuxKernel>,
    attached: PerSlot<Option<Attached>>,
    /// The last spec that could be used.
    wanted: Option<Arc<Wanted>>,
    enrolment: Option<Enrolment>,
    pod_devices: PodDevices,
    /// What was wanted of the kernel last.
    desired: Datapath,
}

impl Node {
    pub(crate) fn new(
        host: Host,
        plugin: Plugin,
        metrics: Arc<Metrics>,
        wake: mpsc::Sender<()>,
    ) -> Self {
        Self {
            host,
            plugin,
            metrics,
            wake,
            started: Instant::now(),
            began: false,
            survey: Survey::default(),
            kernel: None,
            attached: PerSlot::default(),
            wanted: None,
            enrolment: None,
            pod_devices: PodDevices::default(),
            desired: Datapath::default(),
        }
    }

    /// Listens for changes of the host's namespace.
    pub(crate) fn listen(&self) -> std::io::Result<Changes> {
        Changes::listen_with_sets(&self.host.netns, &self.host.names, self.wake.clone())
    }

    /// How long a pass may still have to wait for the proxy.
    pub(crate) fn grace_left(&self) -> Duration {
        order::grace_left(self.started.elapsed())
    }

    /// One pass. `full`: also look at what has no notification and rarely changes. Nothing comes of it
    /// while the proxy of a data path that stands is awaited.
    pub(crate) async fn pass(
        &mut self,
        object: &AmbientNode,
        roster: &mut Roster,
        full: bool,
    ) -> Option<Outcome> {
        let invalid_spec = self.take_spec(object);
        let surveyed = self.survey(full, backend_of(object)).await;
        let Some(wanted) = self.wanted.clone() else {
            return Some(nothing_wanted(
                object,
                invalid_spec,
                self.survey.facts().cloned(),
            ));
        };
        let not_held = self.plugin.maintain(&wanted, &self.host.names, full);
        roster.choose(wanted.ports, &self.enrolled());
        let (proxy, attachments) = self.attach(roster).await;
        self.tell(&wanted, roster);
        let failure = match surveyed {
            Err(failure) => Some(failure),
            Ok(()) => match self.mend(&wanted, roster, &attachments, full).await {
                Ok(Progressed::Done) => None,
                Ok(Progressed::Waiting) => return None,
                Err(failure) => Some(failure),
            },
        };
        if failure.is_some() {
            self.release(&wanted).await;
        }
        // Who has left the kernel may leave the proxy.
        self.tell(&wanted, roster);
        let mut outcome = self.outcome(object, invalid_spec, proxy, failure, roster, &wanted);
        outcome.warning = outcome.warning.or(not_held);
        Some(outcome)
    }

    /// Lets every pod go, the first step of a removal: their new connections are their own, and what the
    /// proxies carry goes on. Whether there was anybody.
    pub(crate) async fn let_go(&mut self, roster: &mut Roster) -> Result<bool, Failure> {
        let anybody = !self.enrolled().is_empty();
        let Some(before) = self.wanted.clone().filter(|_| anybody) else {
            return Ok(false);
        };
        let mut nobody = Wanted::clone(&before);
        nobody.pods.clear();
        let nobody = Arc::new(nobody);
        self.wanted = Some(nobody.clone());
        let (_, attachments) = self.attach(roster).await;
        self.mend(&nobody, roster, &attachments, false).await?;
        self.tell(&nobody, roster);
        Ok(true)
    }

    /// Removes all of it: the AmbientNode is gone.
    pub(crate) async fn remove(&mut self, roster: &mut Roster) -> Result<(), Failure> {
        // First, so that nobody is held after holds were looked for.
        let withdrawn = self.plugin.withdraw();
        withdrawn.map_err(|error| Failure::plugin(&error))?;
        self.survey(false, None).await?;
        let interest = self.desired.clone();
        let Some(kernel) = &self.kernel else {
            return Ok(());
        };
        let observed = kernel
            .observe(&interest)
            .await
            .map_err(|error| Failure::from(&error))?;
        let steps = plan(&Datapath::default(), &observed);
        kernel
            .apply(&steps)
            .await
            .map_err(|error| Failure::from(&error))?;
        let forgotten = cleanup::forget(&self.plugin);
        forgotten.map_err(|error| Failure::plugin(&error))?;
        (self.desired, self.wanted, self.enrolment) = (Datapath::default(), None, None);
        roster.settle(None);
        roster.tell(&Configure::default());
        Ok(())
    }

    /// Removes what an earlier agent left; how many steps that took.
    pub(crate) async fn sweep(&mut self) -> Result<usize, CleanupError> {
        let Host {
            netns,
            sysctl_root,
            names,
        } = &self.host;
        cleanup::sweep(netns.clone(), sysctl_root, names, &mut self.plugin).await
    }

    /// Wakes the agent when the host's CNI chain changes; the tick makes up for it where it cannot.
    pub(crate) fn watch_plugin(&self) {
        if let Err(errno) = self.plugin.watch(self.wake.clone()) {
            tracing::warn!("watch the host's CNI chain: {errno}; it is looked at every 20 s");
        }
    }

    /// Takes the spec over if it can be used; else says why not.
    fn take_spec(&mut self, object: &AmbientNode) -> Option<String> {
        match desired::parse(&object.spec) {
            Ok(wanted) => {
                self.wanted = Some(Arc::new(wanted));
                None
            }
            Err(invalid) => Some(invalid.to_string()),
        }
    }

    /// Surveys the host, and opens its kernel.
    async fn survey(&mut self, full: bool, kept: Option<IptablesBackend>) -> Result<(), Failure> {
        let before = self.survey.facts().map(|facts| facts.iptables);
        let renewed = self.survey.renew(&self.host, full, kept).await?;
        let Some(facts) = self.survey.facts() else {
            return Ok(());
        };
        // A host that had no rules at first has shown what it uses.
        if before.is_some_and(|before| before != facts.iptables) {
            (self.kernel, self.attached) = (None, PerSlot::default());
        }
        if self.kernel.is_none() {
            let kernel = LinuxKernel::in_namespace(
                self.host.netns.clone(),
                facts.iptables,
                self.host.sysctl_root.clone(),
                self.host.names.clone(),
            );
            self.kernel = Some(kernel.map_err(|error| Failure::from(&error))?);
        }
        if let Some(kernel) = self.kernel.as_ref().filter(|_| renewed) {
            kernel.learn(self.survey.dumps());
        }
        Ok(())
    }

    /// Tells the proxies who is theirs.
    fn tell(&self, wanted: &Wanted, roster: &mut Roster) {
        let none = Enrolment::default();
        let enrolment = self.enrolment.as_ref().unwrap_or(&none);
        let local_traffic = if wanted.local_by_tunnel {
            LocalTraffic::Hbone
        } else {
            LocalTraffic::Direct
        };
        roster.tell(&Configure {
            generation: 0,
            listeners: roster::listeners(wanted.ports),
            workloads: enrolment
                .for_proxy(&wanted.pods)
                .into_iter()
                .map(message)
                .collect(),
            local_traffic: local_traffic.into(),
            // The roster says to each which it has.
            duty: Duty::Unspecified.into(),
        });
    }

    fn enrolled(&self) -> std::collections::BTreeSet<String> {
        self.enrolment
            .as_ref()
            .map(Enrolment::uids)
            .unwrap_or_default()
    }

    fn outcome(
        &self,
        object: &AmbientNode,
        invalid_spec: Option<String>,
        proxy: ProxyState,
        failure: Option<Failure>,
        roster: &Roster,
        wanted: &Wanted,
    ) -> Outcome {
        let session = roster.current();
        let serving = session.is_some_and(|session| session.is_serving(wanted.ports));
        let enrolled = self.enrolled();
        let workload = |pod: &Pod| {
            let uid = &pod.workload.uid;
            WorkloadOutcome {
                workload: pod.workload.clone(),
                progress: session.map_or(Progress::Waiting, |session| session.workload(uid)),
                redirected: serving && enrolled.contains(uid),
            }
        };
        Outcome {
            generation: object.metadata.generation,
            invalid_spec,
            failure_mode: wanted.failure_mode,
            facts: self.survey.facts().cloned(),
            proxy,
            rejection: roster.rejection().cloned(),
            failure,
            warning: self.survey.warning(),
            listeners: session
                .map(|session| session.listeners(wanted.ports))
                .unwrap_or_default(),
            workloads: wanted.pods.iter().map(workload).collect(),
            unusable: wanted.unusable.clone(),
            excluded: wanted.excluded.clone(),
        }
    }
}

/// The backend of iptables that the status speaks of: an earlier agent's choice.
fn backend_of(object: &AmbientNode) -> Option<IptablesBackend> {
    let kernel = object.status.as_ref()?.kernel.as_ref()?;
    Some(match kernel.iptables {
        crds::IptablesBackend::Nft => IptablesBackend::Nft,
        crds::IptablesBackend::Legacy => IptablesBackend::Legacy,
    })
}

/// The first spec of this agent cannot be used: nothing is touched.
fn nothing_wanted(
    object: &AmbientNode,
    invalid_spec: Option<String>,
    facts: Option<Facts>,
) -> Outcome {
    Outcome {
        generation: object.metadata.generation,
        invalid_spec,
        failure_mode: datapath::FailureMode::Closed,
        facts,
        proxy: ProxyState::Absent,
        rejection: None,
        failure: None,
        warning: None,
        listeners: Vec::new(),
        workloads: Vec::new(),
        unusable: Vec::new(),
        excluded: object.spec.excluded.clone(),
    }
}

fn message(pod: &Pod) -> Workload {
    let workload = &pod.workload;
    Workload {
        uid: workload.uid.clone(),
        namespace: workload.namespace.clone(),
        name: workload.name.clone(),
        service_account: workload.service_account.clone(),
        ips: pod.ips.iter().map(ToString::to_string).collect(),
    }
}
