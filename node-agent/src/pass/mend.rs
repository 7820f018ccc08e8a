//! The steps from what the kernel holds to what is wanted: build, observe, plan, apply.

use std::collections::BTreeSet;

use datapath::attachment::Attachment;
use datapath::kernel::Kernel;
use datapath::names::Names;
use datapath::{
    Datapath, Item, NodeInput, PerSlot, Plan, Slot, TunnelKind, build, plan, with_holds,
};

use super::Node;
use crate::desired::{self, Pod, Wanted};
use crate::failure::Failure;
use crate::holds::Holds;
use crate::order::{self, Enrolment};
use crate::roster::{Progress, Roster, Session};

/// Whether the pass got to the point where something can be said.
pub(super) enum Progressed {
    /// The kernel was brought to what is wanted.
    Done,
    /// The proxy of a data path that stands has not answered yet.
    Waiting,
}

/// What the desired state is built from, but for the pods.
struct Draft<'a> {
    names: Names,
    wanted: &'a Wanted,
    attachments: &'a PerSlot<Option<Attachment>>,
    serving: Option<Slot>,
    devices: BTreeSet<String>,
}

impl Draft<'_> {
    fn with(&self, pods: &[Pod]) -> NodeInput {
        desired::input(
            &self.names,
            self.wanted,
            self.attachments,
            self.serving,
            pods,
            &self.devices,
        )
    }
}

impl Node {
    /// Brings the kernel from what it holds to what is wanted.
    pub(super) async fn mend(
        &mut self,
        wanted: &Wanted,
        roster: &mut Roster,
        attachments: &PerSlot<Option<Attachment>>,
        full: bool,
    ) -> Result<Progressed, Failure> {
        self.check_kind(wanted)?;
        let draft = self.draft(wanted, roster, attachments, full).await?;
        // The settings of what may be wanted are the same whoever is enrolled.
        let outline = build(&draft.with(&[]));
        let current = roster
            .current_slot()
            .and_then(|slot| attachments[slot].as_ref());
        let due = full || !self.began;
        self.survey
            .look_out(&self.host, (wanted, &outline), current, due)
            .await?;
        let interest = with_settings(outline, &self.desired);
        let Some(observed) = self.look(&interest, full).await? else {
            return Ok(Progressed::Waiting);
        };
        let forbidden = self.survey.forbids();
        let begun = observed.host.iter().any(|item| !item.is_hold());
        if let Some(forbidden) = forbidden.clone().filter(|_| !begun) {
            return Err(forbidden);
        }
        if !self.may_begin(roster, &observed) {
            self.enrolment = Some(Enrolment::adopt(&wanted.pods, &observed));
            return Ok(Progressed::Waiting);
        }
        let selected = self.select(wanted, roster, &observed);
        let enrolled: Vec<&Pod> = selected.iter().collect();
        let holds = self.holds(wanted, &enrolled).await?;
        let built = build(&draft.with(&selected));
        let desired = with_holds(built, &holds.rules(), &self.host.names);
        self.reach(desired, &selected, &observed, &interest).await?;
        self.forget(&holds)?;
        roster.settle(draft.serving);
        let complaint = forbidden.or_else(|| self.survey.breaks());
        complaint.map_or(Ok(Progressed::Done), Err)
    }

    /// Lets go who is not to be held, where the rest cannot be brought to what is wanted: pods that stay
    /// out of the mesh need not wait for it.
    pub(super) async fn release(&self, wanted: &Wanted) {
        if let Err(failure) = self.try_release(wanted).await {
            tracing::warn!(
                reason = failure.reason,
                "let go of held pods: {}",
                failure.message
            );
        }
    }

    async fn try_release(&self, wanted: &Wanted) -> Result<(), Failure> {
        let Some(kernel) = &self.kernel else {
            return Ok(());
        };
        let observed = self.look(&self.desired, false).await?.unwrap_or_default();
        let enrolled: Vec<&Pod> = self.enrolment.iter().flat_map(Enrolment::pods).collect();
        let holds = self.holds(wanted, &enrolled).await?;
        let desired = with_holds(observed.clone(), &holds.rules(), &self.host.names);
        let applied = kernel.apply(&plan(&desired, &observed)).await;
        applied.map_err(|error| Failure::from(&error))?;
        self.forget(&holds)
    }

    async fn holds(&self, wanted: &Wanted, enrolled: &[&Pod]) -> Result<Holds, Failure> {
        let wanted = Some(wanted).filter(|_| self.plugin.holds());
        let found = Holds::find(&self.host.netns, self.plugin.records(), wanted, enrolled);
        found.await.map_err(|error| Failure::plugin(&error))
    }

    fn forget(&self, holds: &Holds) -> Result<(), Failure> {
        let forgotten = holds.forget(self.plugin.records());
        forgotten.map_err(|error| Failure::plugin(&error))
    }

    fn check_kind(&self, wanted: &Wanted) -> Result<(), Failure> {
        let geneve = self.survey.facts().is_some_and(|facts| facts.geneve);
        if wanted.kind == TunnelKind::Geneve && !geneve {
            return Err(Failure::geneve_unsupported());
        }
        Ok(())
    }

    async fn draft<'a>(
        &mut self,
        wanted: &'a Wanted,
        roster: &Roster,
        attachments: &'a PerSlot<Option<Attachment>>,
        full: bool,
    ) -> Result<Draft<'a>, Failure> {
        let looked = self.pod_devices.look(&self.host.netns, &wanted.pods, full);
        looked.await.map_err(|error| Failure::from(&error))?;
        Ok(Draft {
            names: self.host.names.clone(),
            wanted,
            attachments,
            serving: roster.serving(wanted.ports),
            devices: self.pod_devices.names(),
        })
    }

    /// What the kernel holds; none if it is not open.
    async fn look(&self, interest: &Datapath, full: bool) -> Result<Option<Datapath>, Failure> {
        let Some(kernel) = &self.kernel else {
            return Ok(None);
        };
        let observed = if full {
            kernel.observe(interest).await
        } else {
            kernel.glance(interest).await
        };
        observed.map(Some).map_err(|error| Failure::from(&error))
    }

    /// Whether changes may be made, or have been. The proxy to wait for is the one that what stands
    /// leads to.
    fn may_begin(&self, roster: &Roster, observed: &Datapath) -> bool {
        let awaited = match order::leads_to(observed, &self.host.names) {
            Some(slot) => roster.in_slot(slot),
            None => roster.current(),
        };
        let answered = awaited.is_some_and(Session::has_answered);
        self.began || order::may_begin(observed, answered, self.started.elapsed())
    }

    /// The pods that the kernel should hold.
    fn select(&mut self, wanted: &Wanted, roster: &Roster, observed: &Datapath) -> Vec<Pod> {
        let session = roster.current();
        let is_ready =
            |uid: &str| session.is_some_and(|session| session.workload(uid) == Progress::Ready);
        self.enrolment
            .get_or_insert_with(|| Enrolment::adopt(&wanted.pods, observed))
            .select(&wanted.pods, is_ready)
    }

    /// Makes the kernel hold what is desired, and takes note of whom it holds then.
    async fn reach(
        &mut self,
        desired: Datapath,
        selected: &[Pod],
        observed: &Datapath,
        interest: &Datapath,
    ) -> Result<(), Failure> {
        let steps = plan(&desired, observed);
        let repairs = self.began && desired == self.desired;
        self.began = true;
        if steps.is_empty() {
            self.settle(selected, observed);
            self.desired = desired;
            return Ok(());
        }
        self.metrics.applies(&steps, repairs);
        tracing::info!(steps = steps.steps.len(), repairs, "the kernel is changed");
        // What is no longer wanted is still looked for if this fails half-way.
        self.desired = with_settings(desired.clone(), &self.desired);
        let (applied, after) = self.apply(&steps, interest).await?;
        self.settle(selected, &after);
        applied?;
        let mut left = plan(&desired, &after);
        // Whoever began to be held meanwhile is the next pass's business.
        let is_new = |item: &Item| item.is_hold() && !observed.host.contains(item);
        left.steps.retain(|step| !is_new(step.change.item()));
        if !left.is_empty() {
            return Err(Failure::not_converged(&left));
        }
        self.desired = desired;
        Ok(())
    }

    /// Takes the steps; whether all went well, and what the kernel holds after them.
    async fn apply(
        &self,
        steps: &Plan,
        interest: &Datapath,
    ) -> Result<(Result<(), Failure>, Datapath), Failure> {
        let Some(kernel) = &self.kernel else {
            return Ok((Ok(()), Datapath::default()));
        };
        let applied = kernel.apply(steps).await;
        let after = kernel.glance(interest).await;
        let after = after.map_err(|error| Failure::from(&error))?;
        Ok((applied.map_err(|error| Failure::from(&error)), after))
    }

    fn settle(&mut self, selected: &[Pod], observed: &Datapath) {
        if let Some(enrolment) = &mut self.enrolment {
            enrolment.settle(selected, observed);
        }
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
