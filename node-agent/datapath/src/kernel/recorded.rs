//! A kernel in memory, for tests of what uses one: it holds items, notes steps, fails on demand.
//!
//! It models what the plan relies on: a device takes everything on it along when it goes.

use std::sync::{Mutex, PoisonError};

use crate::datapath::{Datapath, Item, Link, Place};
use crate::kernel::{ApplyError, Kernel, KernelError};
use crate::names::peer;
use crate::netns::Netns;
use crate::plan::{Plan, Step};
use crate::slot::{PerSlot, Slot};

/// Decides whether a step fails.
type Failure = Box<dyn FnMut(&Step) -> Option<KernelError> + Send>;

/// The kernel in memory.
#[derive(Default)]
pub struct RecordedKernel {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    held: Datapath,
    taken: Vec<Step>,
    attached: PerSlot<bool>,
    failure: Option<Failure>,
}

impl RecordedKernel {
    /// A kernel that holds this already.
    #[must_use]
    pub fn holding(held: Datapath) -> Self {
        let kernel = Self::default();
        kernel.with(|inner| inner.held = held);
        kernel
    }

    /// What it holds, whatever is attached.
    #[must_use]
    pub fn held(&self) -> Datapath {
        self.with(|inner| inner.held.clone())
    }

    /// Somebody else changes what it holds.
    pub fn disturb(&self, change: impl FnOnce(&mut Datapath)) {
        self.with(|inner| change(&mut inner.held));
    }

    /// The steps that it has taken since the last call.
    #[must_use]
    pub fn taken(&self) -> Vec<Step> {
        self.with(|inner| std::mem::take(&mut inner.taken))
    }

    /// From now on a step fails when `failure` says so.
    pub fn fail_when(&self, failure: impl FnMut(&Step) -> Option<KernelError> + Send + 'static) {
        self.with(|inner| inner.failure = Some(Box::new(failure)));
    }

    fn with<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        work(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl std::fmt::Debug for RecordedKernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("RecordedKernel").field(&self.held()).finish()
    }
}

impl Kernel for RecordedKernel {
    fn attach(&mut self, slot: Slot, _proxy: Netns) -> Result<(), KernelError> {
        self.with(|inner| inner.attached[slot] = true);
        Ok(())
    }

    fn detach(&mut self, slot: Slot) {
        self.with(|inner| inner.attached[slot] = false);
    }

    async fn observe(&self, interest: &Datapath) -> Result<Datapath, KernelError> {
        let mut seen = self.held();
        for (slot, attached) in self.with(|inner| inner.attached).iter() {
            if !attached {
                seen.proxies[slot].clear();
            }
        }
        for place in Place::ALL {
            let interest = interest.side(place);
            seen.side_mut(place)
                .retain(|item| !matches!(item, Item::Sysctl(_)) || interest.contains(item));
        }
        Ok(seen)
    }

    async fn glance(&self, interest: &Datapath) -> Result<Datapath, KernelError> {
        self.observe(interest).await
    }

    async fn apply(&self, plan: &Plan) -> Result<(), ApplyError> {
        for step in &plan.steps {
            let taken = self.with(|inner| inner.take(step));
            taken.map_err(|cause| ApplyError {
                step: Box::new(step.clone()),
                cause,
            })?;
        }
        Ok(())
    }
}

impl Inner {
    fn take(&mut self, step: &Step) -> Result<(), KernelError> {
        if let Some(error) = self.failure.as_mut().and_then(|failure| failure(step)) {
            return Err(error);
        }
        if let Place::Proxy(slot) = step.place
            && !self.attached[slot]
        {
            return Err(KernelError::Detached);
        }
        take(&mut self.held, step);
        self.taken.push(step.clone());
        Ok(())
    }
}

/// What a step does to what is held.
pub fn take(held: &mut Datapath, step: &Step) {
    let (old, new) = step.change.ends();
    if let Some(old) = old {
        held.side_mut(step.place).remove(old);
        if let Item::Link(link) = old {
            lose(held, step.place, link);
        }
    }
    if let Some(new) = new {
        // There is one of each, whatever the plan took for gone already.
        let side = held.side_mut(step.place);
        side.retain(|item| !new.replaces(item));
        side.insert(new.clone());
    }
}

fn lose(held: &mut Datapath, place: Place, link: &Link) {
    let on = |device: String| move |item: &Item| item.device() != Some(device.as_str());
    held.side_mut(place).retain(on(link.name().to_owned()));
    if place == Place::Host && matches!(link, Link::Veth { .. }) {
        for slot in Slot::BOTH {
            held.proxies[slot].retain(on(peer(link.name())));
        }
    }
}
