//! One pass over the node: what is wanted, what is there, the difference, and what came of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crds::{AmbientNode, reasons};
use datapath::attachment::{self, Attachment};
use datapath::changes::Changes;
use datapath::facts::Facts;
use datapath::kernel::{Kernel, LinuxKernel};
use datapath::netns::Netns;
use datapath::{Datapath, IptablesBackend, Item, TunnelKind, build, plan};
use protocol::node::{Configure, LocalTraffic, Workload};
use tokio::sync::mpsc;

use crate::desired::{self, Pod, Wanted};
use crate::failure::{Complaint, Failure, chain};
use crate::metrics::Metrics;
use crate::order::{self, Enrolment};
use crate::pod_devices::PodDevices;
use crate::report::{Outcome, ProxyState, WorkloadOutcome};
use crate::roster::{self, Progress, Roster, SessionId};
use crate::survey::{Host, Survey};

/// What the agent knows of its node from pass to pass.
pub(crate) struct Node {
    host: Host,
    metrics: Arc<Metrics>,
    wake: mpsc::Sender<()>,
    started: Instant,
    /// The first change was made, or might have been.
    began: bool,
    survey: Survey,
    kernel: Option<LinuxKernel>,
    attached: Option<(SessionId, Changes)>,
    /// The last spec that could be used.
    wanted: Option<Arc<Wanted>>,
    enrolment: Option<Enrolment>,
    pod_devices: PodDevices,
    /// What was wanted of the kernel last.
    desired: Datapath,
}

/// Whether the pass got to the point where something can be said.
enum Progressed {
    /// The kernel was brought to what is wanted.
    Done,
    /// The proxy of a data path that stands has not answered yet.
    Waiting,
}

impl Node {
    pub(crate) fn new(host: Host, metrics: Arc<Metrics>, wake: mpsc::Sender<()>) -> Self {
        Self {
            host,
            metrics,
            wake,
            started: Instant::now(),
            began: false,
            survey: Survey::default(),
            kernel: None,
            attached: None,
            wanted: None,
            enrolment: None,
            pod_devices: PodDevices::default(),
            desired: Datapath::default(),
        }
    }

    /// Listens for changes of the host's namespace.
    pub(crate) fn listen(&self) -> std::io::Result<Changes> {
        Changes::listen(&self.host.netns, self.wake.clone())
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
        roster.choose(wanted.ports, &self.enrolled());
        let (proxy, attachment) = self.attach(roster).await;
        self.tell(&wanted, roster);
        let failure = match surveyed {
            Err(failure) => Some(failure),
            Ok(()) => match self.mend(&wanted, roster, attachment.as_ref(), full).await {
                Ok(Progressed::Done) => None,
                Ok(Progressed::Waiting) => return None,
                Err(failure) => Some(failure),
            },
        };
        // Who has left the kernel may leave the proxy.
        self.tell(&wanted, roster);
        Some(self.outcome(object, invalid_spec, proxy, failure, roster, &wanted))
    }

    /// Removes all of it: the AmbientNode is gone.
    pub(crate) async fn remove(&mut self, roster: &mut Roster) -> Result<(), Failure> {
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
        (self.desired, self.wanted, self.enrolment) = (Datapath::default(), None, None);
        roster.tell(&Configure::default());
        Ok(())
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
            (self.kernel, self.attached) = (None, None);
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

    /// Looks at the chosen proxy's namespace, and makes it the kernel's proxy side.
    async fn attach(&mut self, roster: &mut Roster) -> (ProxyState, Option<Attachment>) {
        let Some(session) = roster.current() else {
            self.detach();
            return (ProxyState::Absent, None);
        };
        let connected = roster.current_is_connected();
        let found =
            attachment::find(&self.host.netns, &session.netns, &self.host.sysctl_root).await;
        let attachment =
            found
                .map_err(|error| Complaint::unusable(&error))
                .and_then(|attachment| {
                    self.enter(session.id, &session.netns)
                        .map_err(|message| Complaint {
                            reason: reasons::PROXY_UNUSABLE,
                            message,
                        })?;
                    Ok(attachment)
                });
        match attachment {
            Ok(attachment) if connected => (
                ProxyState::Attached(session.identity.clone(), attachment.clone()),
                Some(attachment),
            ),
            // It may start again in the same pod: its devices stay.
            Ok(attachment) => (ProxyState::Absent, Some(attachment)),
            Err(why) => {
                self.detach();
                if connected {
                    (ProxyState::Unusable(why), None)
                } else {
                    roster.forget_dead();
                    (ProxyState::Absent, None)
                }
            }
        }
    }

    fn enter(&mut self, id: SessionId, netns: &Netns) -> Result<(), String> {
        let is_same = self
            .attached
            .as_ref()
            .is_some_and(|(attached, changes)| *attached == id && changes.is_listening());
        let (Some(kernel), false) = (&mut self.kernel, is_same) else {
            return Ok(());
        };
        kernel
            .attach(netns.clone())
            .map_err(|error| chain(&error))?;
        let changes = Changes::listen(netns, self.wake.clone()).map_err(|error| chain(&error))?;
        self.attached = Some((id, changes));
        Ok(())
    }

    fn detach(&mut self) {
        self.attached = None;
        if let Some(kernel) = &mut self.kernel {
            kernel.detach();
        }
    }

    /// Brings the kernel from what it holds to what is wanted.
    async fn mend(
        &mut self,
        wanted: &Wanted,
        roster: &Roster,
        attachment: Option<&Attachment>,
        full: bool,
    ) -> Result<Progressed, Failure> {
        let geneve = self.survey.facts().is_some_and(|facts| facts.geneve);
        if wanted.kind == TunnelKind::Geneve && !geneve {
            return Err(Failure::geneve_unsupported());
        }
        let session = roster.current();
        let serving = session.is_some_and(|session| session.is_serving(wanted.ports));
        let is_ready =
            |uid: &str| session.is_some_and(|session| session.workload(uid) == Progress::Ready);
        let looked = self.pod_devices.look(&self.host.netns, &wanted.pods, full);
        looked.await.map_err(|error| Failure::from(&error))?;
        let devices = self.pod_devices.names();
        // The settings of what may be wanted are the same whoever is enrolled.
        let draft = build(&desired::input(
            &self.host.names,
            wanted,
            attachment,
            serving,
            &[],
            &devices,
        ));
        let due = full || !self.began;
        self.survey
            .look_out(&self.host, (wanted, &draft), attachment, due)
            .await?;
        let Some(kernel) = &self.kernel else {
            return Ok(Progressed::Waiting);
        };
        let interest = with_settings(draft, &self.desired);
        let observed = if full {
            kernel.observe(&interest).await
        } else {
            kernel.glance(&interest).await
        }
        .map_err(|error| Failure::from(&error))?;
        let forbidden = self.survey.forbids();
        if let Some(forbidden) = forbidden.clone().filter(|_| observed.host.is_empty()) {
            return Err(forbidden);
        }
        let answered = session.is_some_and(roster::Session::has_answered);
        if !self.began && !order::may_begin(&observed, answered, self.started.elapsed()) {
            self.enrolment = Some(Enrolment::adopt(&wanted.pods, &observed));
            return Ok(Progressed::Waiting);
        }
        let enrolment = self
            .enrolment
            .get_or_insert_with(|| Enrolment::adopt(&wanted.pods, &observed));
        let selected = enrolment.select(&wanted.pods, is_ready);
        let desired = build(&desired::input(
            &self.host.names,
            wanted,
            attachment,
            serving,
            &selected,
            &devices,
        ));
        let steps = plan(&desired, &observed);
        let repairs = self.began && desired == self.desired;
        self.began = true;
        if steps.is_empty() {
            enrolment.settle(&selected, &observed);
            self.desired = desired;
        } else {
            self.metrics.applies(&steps, repairs);
            tracing::info!(steps = steps.steps.len(), repairs, "the kernel is changed");
            let applied = kernel.apply(&steps).await;
            let after = kernel
                .glance(&interest)
                .await
                .map_err(|error| Failure::from(&error))?;
            enrolment.settle(&selected, &after);
            self.desired = with_settings(desired.clone(), &self.desired);
            applied.map_err(|error| Failure::from(&error))?;
            let left = plan(&desired, &after);
            if !left.is_empty() {
                return Err(Failure::not_converged(&left));
            }
            self.desired = desired;
        }
        let complaint = forbidden.or_else(|| self.survey.breaks());
        complaint.map_or(Ok(Progressed::Done), Err)
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

/// `datapath` with the settings of `before`, so that those no longer wanted are seen and put back.
fn with_settings(mut datapath: Datapath, before: &Datapath) -> Datapath {
    let settings = before
        .host
        .iter()
        .filter(|item| matches!(item, Item::Sysctl(_)));
    datapath.host.extend(settings.cloned());
    datapath
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
