//! The real kernel: reads and writes both namespaces, one dump a kind, changes of a kind together.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use crate::datapath::{Datapath, Item, Member, Place, Table};
use crate::family::Family;
use crate::input::IptablesBackend;
use crate::kernel::generation::Generation;
use crate::kernel::ip_set;
use crate::kernel::iptables::{Dump, Iptables, IptablesError};
use crate::kernel::netfilter::Netfilter;
use crate::kernel::netlink::Netlink;
use crate::kernel::seen::{Seen, Trust};
use crate::kernel::{ApplyError, Kernel, KernelError, sysctl};
use crate::names::Names;
use crate::netns::Netns;
use crate::plan::{Change, Plan, Step};
use crate::slot::{PerSlot, Slot};

/// Requests that wait for the kernel's answer at a time: their answers fit in a socket's buffer.
const BATCH: usize = 64;

/// Tables that hold chains of ours.
const HOST_TABLES: [Table; 2] = [Table::Mangle, Table::Nat];
const PROXY_TABLES: [Table; 1] = [Table::Mangle];

/// The kernel of this node: the host's namespace, and those of the attached proxies.
#[derive(Debug)]
pub struct LinuxKernel {
    host: Side,
    proxies: PerSlot<Option<Side>>,
    backend: IptablesBackend,
    proc_root: PathBuf,
    names: Names,
}

/// One namespace.
#[derive(Debug)]
struct Side {
    netns: Netns,
    netlink: Netlink,
    netfilter: Netfilter,
    iptables: Iptables,
    seen: Seen,
}

/// How closely to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// At everything.
    Close,
    /// Not at chains, unless they have been written to.
    Brief,
}

impl LinuxKernel {
    /// The kernel whose host side is this namespace, without a proxy. `proc_root` is where
    /// `/proc/sys/net` can be written.
    ///
    /// # Errors
    /// If the namespace cannot be entered.
    pub fn in_namespace(
        host: Netns,
        backend: IptablesBackend,
        proc_root: PathBuf,
        names: Names,
    ) -> Result<Self, KernelError> {
        let host = Side::open(host, Place::Host, backend)?;
        Ok(Self {
            host,
            proxies: PerSlot::default(),
            backend,
            proc_root,
            names,
        })
    }

    /// The value of a setting of the host, none if there is no such setting.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn setting(&self, path: &str) -> Result<Option<String>, KernelError> {
        let path = self.proc_root.join(path);
        let read = self.host.netns.run(|| sysctl::read(&path));
        Ok(read.map_err(|error| KernelError::Enter(Place::Host, error))??)
    }

    /// Takes over what a survey of the host has just read, so that the observation that comes now need
    /// not read it again.
    pub fn learn<'a>(&self, dumps: impl Iterator<Item = Dump<'a>>) {
        let mut ours = dumps.filter(|dump| dump.backend == self.backend).peekable();
        if ours.peek().is_none() {
            return;
        }
        let of_one = |dump: Dump<'a>| {
            HOST_TABLES.map(|table| {
                let chains = dump.chains(table, &self.names);
                let generation = dump.generation.as_ref();
                let generation = generation.map(|all| all.of_table(table));
                ((dump.family, table), generation, chains)
            })
        };
        self.host.seen.learn(ours.flat_map(of_one));
    }

    async fn look(&self, interest: &Datapath, look: Look) -> Result<Datapath, KernelError> {
        let host = self.observe_host(&interest.host, look).await?;
        let mut proxies = PerSlot::default();
        for (slot, side) in self.proxies.taken() {
            let interest = &interest.proxies[slot];
            let mut items = self
                .observe_side(side, Place::Proxy(slot), interest)
                .await?;
            let wanted = chains(interest, &items);
            items.extend(self.chains(side, wanted, &PROXY_TABLES, look).await?);
            proxies[slot] = items;
        }
        Ok(Datapath { host, proxies })
    }

    async fn observe_host(
        &self,
        interest: &BTreeSet<Item>,
        look: Look,
    ) -> Result<BTreeSet<Item>, KernelError> {
        let side = &self.host;
        let mut items = self.observe_side(side, Place::Host, interest).await?;
        let wanted = chains(interest, &items);
        items.extend(self.chains(side, wanted, &HOST_TABLES, look).await?);
        items.extend(ip_set::observe(&side.netfilter, &self.names)?);
        Ok(items)
    }

    async fn observe_side(
        &self,
        side: &Side,
        place: Place,
        interest: &BTreeSet<Item>,
    ) -> Result<BTreeSet<Item>, KernelError> {
        let mut peers = BTreeMap::new();
        if place == Place::Host {
            for (slot, proxy) in self.proxies.taken() {
                peers.extend(proxy.netlink.peers(slot, &self.names).await?);
            }
        }
        let mut items = side.netlink.observe(place, &self.names, &peers).await?;
        items.extend(sysctl::observe(&self.proc_root, &side.netns, interest)?);
        Ok(items)
    }

    /// Our chains of some tables, those that have to be read all at once. Programs run on threads of
    /// their own: they take tens of milliseconds.
    async fn chains(
        &self,
        side: &Side,
        families: &[Family],
        tables: &[Table],
        look: Look,
    ) -> Result<Vec<Item>, IptablesError> {
        let of_one = |family, table| async move {
            if let Some(chains) = side.seen.news((family, table)) {
                return Ok(chains);
            }
            let generation = || side.generation(family, table);
            let trust = match look {
                Look::Close => Trust::Generation(generation()),
                Look::Brief => Trust::Any,
            };
            if let Some(chains) = side.seen.recall((family, table), &trust) {
                return Ok(chains);
            }
            let generation = match trust {
                Trust::Generation(generation) => generation,
                Trust::Any => generation(),
            };
            let (iptables, netns, names) = (side.iptables, side.netns.clone(), self.names.clone());
            let read = move || iptables.observe((family, table), &names, &netns);
            let chains = aside(read).await?;
            side.seen.keep((family, table), generation, chains.clone());
            Ok(chains)
        };
        let all = families
            .iter()
            .flat_map(|family| tables.iter().map(move |table| of_one(*family, *table)));
        let found = futures::future::try_join_all(all).await?;
        Ok(found.into_iter().flatten().map(Item::Chains).collect())
    }

    /// Takes steps of one kind in one place; the index of the one that failed.
    async fn take(&self, steps: &[Step]) -> Result<(), (usize, KernelError)> {
        let Some(first) = steps.first() else {
            return Ok(());
        };
        let side = match first.place {
            Place::Host => &self.host,
            Place::Proxy(slot) => {
                let side = self.proxies[slot].as_ref();
                side.ok_or((0, KernelError::Detached))?
            }
        };
        let at = |(index, error): (usize, _)| (index, KernelError::Netlink(error));
        match kind(first) {
            Kind::Members => {
                let changes: Vec<_> = steps.iter().filter_map(member).collect();
                ip_set::change_members(&side.netns, &changes)
                    .map_err(|(index, error)| (index, error.into()))
            }
            Kind::Routes => {
                let changes: Vec<_> = steps.iter().map(|step| step.change.ends()).collect();
                side.netlink.change_routes(&changes).await.map_err(at)
            }
            Kind::Single => {
                let (old, new) = first.change.ends();
                match new.or(old) {
                    Some(Item::Chains(_)) => side.replace(old, new).await,
                    Some(Item::Set(_)) => change_set(&side.netns, old, new),
                    Some(Item::Sysctl(_)) => sysctl::write(&self.proc_root, &side.netns, old, new)
                        .map_err(KernelError::from),
                    item => side
                        .netlink
                        .change(old, new, self.other_end(item))
                        .await
                        .map_err(KernelError::from),
                }
                .map_err(|error| (0, error))
            }
        }
    }

    /// The namespace that the other end of a pair of ours is to be in.
    fn other_end(&self, item: Option<&Item>) -> Option<&Netns> {
        let Some(Item::Link(link)) = item else {
            return None;
        };
        let slot = self.names.slot_of(link.name())?;
        Some(&self.proxies[slot].as_ref()?.netns)
    }
}

impl Kernel for LinuxKernel {
    fn attach(&mut self, slot: Slot, proxy: Netns) -> Result<(), KernelError> {
        self.proxies[slot] = Some(Side::open(proxy, Place::Proxy(slot), self.backend)?);
        Ok(())
    }

    fn detach(&mut self, slot: Slot) {
        self.proxies[slot] = None;
    }

    async fn observe(&self, interest: &Datapath) -> Result<Datapath, KernelError> {
        self.look(interest, Look::Close).await
    }

    async fn glance(&self, interest: &Datapath) -> Result<Datapath, KernelError> {
        self.look(interest, Look::Brief).await
    }

    async fn apply(&self, plan: &Plan) -> Result<(), ApplyError> {
        let together = |a: &Step, b: &Step| {
            let kind = kind(a);
            kind != Kind::Single && kind == self::kind(b) && a.place == b.place
        };
        for group in plan.steps.chunk_by(together) {
            for steps in group.chunks(BATCH) {
                for step in steps {
                    tracing::debug!(%step, "apply");
                }
                self.take(steps)
                    .await
                    .map_err(|(index, cause)| ApplyError {
                        step: Box::new(steps[index.min(steps.len() - 1)].clone()),
                        cause,
                    })?;
            }
        }
        Ok(())
    }
}

/// What may be changed together: the order among such steps does not matter.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Members,
    Routes,
    Single,
}

fn kind(step: &Step) -> Kind {
    match step.change.item() {
        Item::Member(_) => Kind::Members,
        Item::Route(_) => Kind::Routes,
        _ => Kind::Single,
    }
}

/// The families that there may be chains of ours in. IPv6's are read only where they are wanted, or
/// where rules are: those are made before chains and removed after them.
fn chains(interest: &BTreeSet<Item>, observed: &BTreeSet<Item>) -> &'static [Family] {
    let is_of_ipv6 = |item: &Item| match item {
        Item::Chains(chains) => chains.family == Family::V6,
        Item::Rule(rule) => rule.family == Family::V6,
        _ => false,
    };
    if interest.iter().chain(observed).any(is_of_ipv6) {
        &Family::ALL
    } else {
        &[Family::V4]
    }
}

fn member(step: &Step) -> Option<(&Member, bool)> {
    match &step.change {
        Change::Add(Item::Member(member))
        | Change::Replace {
            new: Item::Member(member),
            ..
        } => Some((member, true)),
        Change::Remove(Item::Member(member)) => Some((member, false)),
        _ => None,
    }
}

fn change_set(netns: &Netns, old: Option<&Item>, new: Option<&Item>) -> Result<(), KernelError> {
    match (old, new) {
        (None, Some(Item::Set(set))) => ip_set::create(netns, set)?,
        (Some(Item::Set(set)), None) => ip_set::destroy(netns, set)?,
        _ => {}
    }
    Ok(())
}

impl Side {
    fn open(netns: Netns, place: Place, backend: IptablesBackend) -> Result<Self, KernelError> {
        let enter = |error| KernelError::Enter(place, error);
        Ok(Self {
            netlink: Netlink::open(&netns).map_err(enter)?,
            netfilter: Netfilter::open(&netns).map_err(enter)?,
            netns,
            iptables: Iptables::new(backend),
            seen: Seen::default(),
        })
    }

    /// That of the rules of a table.
    fn generation(&self, family: Family, table: Table) -> Option<Generation> {
        let rules = (self.iptables.backend(), family);
        Generation::of(rules, Some(table), &self.netns, &self.netfilter)
    }

    async fn replace(&self, old: Option<&Item>, new: Option<&Item>) -> Result<(), KernelError> {
        for item in [old, new] {
            if let Some(Item::Chains(chains)) = item {
                self.seen.forget((chains.family, chains.table));
            }
        }
        let (iptables, netns) = (self.iptables, self.netns.clone());
        let (old, new) = (old.cloned(), new.cloned());
        Ok(aside(move || iptables.replace(old.as_ref(), new.as_ref(), &netns)).await?)
    }
}

async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, IptablesError> + Send + 'static,
) -> Result<T, IptablesError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(IptablesError::Thread(std::io::Error::other(error))))
}
