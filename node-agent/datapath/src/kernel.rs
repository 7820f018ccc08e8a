//! The real kernel: reads and writes both namespaces.

pub mod ip_set;
pub mod iptables;
pub mod netlink;
pub mod sysctl;

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::datapath::{Datapath, Item, Place, Table};
use crate::input::IptablesBackend;
use crate::kernel::ip_set::IpSetError;
use crate::kernel::iptables::{Iptables, IptablesError};
use crate::kernel::netlink::{Netlink, NetlinkError};
use crate::kernel::sysctl::SysctlError;
use crate::netns::Netns;
use crate::plan::{Change, Plan, Step};

/// The kernel of this node: the host's namespace, and the proxy's when one is attached.
#[derive(Debug)]
pub struct LinuxKernel {
    host: Side,
    proxy: Option<Side>,
    backend: IptablesBackend,
    proc_root: PathBuf,
}

/// One namespace.
#[derive(Debug)]
struct Side {
    netns: Netns,
    netlink: Netlink,
    iptables: Iptables,
}

/// What could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The namespace cannot be entered or has no netlink.
    #[error("enter the {0:?} network namespace")]
    Enter(Place, #[source] std::io::Error),
    /// A device, address, route or rule.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A chain.
    #[error(transparent)]
    Iptables(#[from] IptablesError),
    /// The set or a member of it.
    #[error(transparent)]
    IpSet(#[from] IpSetError),
    /// A setting.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// A step for the proxy's namespace while none is attached.
    #[error("no proxy is attached, its namespace cannot be changed")]
    Detached,
}

/// A step of a plan that failed. Those before it are done.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct ApplyError {
    /// The step.
    pub step: Box<Step>,
    /// Why.
    #[source]
    pub cause: KernelError,
}

impl LinuxKernel {
    /// The kernel without a proxy. `proc_root` is where `/proc/sys/net` can be written.
    ///
    /// # Errors
    /// If netlink cannot be opened.
    pub fn new(backend: IptablesBackend, proc_root: PathBuf) -> Result<Self, KernelError> {
        let host = Side::open(Netns::own(), Place::Host, backend)?;
        Ok(Self {
            host,
            proxy: None,
            backend,
            proc_root,
        })
    }

    /// A kernel whose host side is another namespace than this process's own.
    ///
    /// # Errors
    /// If the namespace cannot be entered.
    pub fn in_namespace(
        host: Netns,
        backend: IptablesBackend,
        proc_root: PathBuf,
    ) -> Result<Self, KernelError> {
        let host = Side::open(host, Place::Host, backend)?;
        Ok(Self {
            host,
            proxy: None,
            backend,
            proc_root,
        })
    }

    /// From now on the proxy's side is this namespace.
    ///
    /// # Errors
    /// If it cannot be entered; the former one stays.
    pub fn attach(&mut self, proxy: Netns) -> Result<(), KernelError> {
        self.proxy = Some(Side::open(proxy, Place::Proxy, self.backend)?);
        Ok(())
    }

    /// From now on there is no proxy's side.
    pub fn detach(&mut self) {
        self.proxy = None;
    }

    /// What the kernel holds of ours. Settings are read only where `interest` names them, and
    /// reported where they have its value.
    ///
    /// # Errors
    /// If something cannot be read.
    pub async fn observe(&self, interest: &Datapath) -> Result<Datapath, KernelError> {
        let host = self.observe_host(&interest.host).await?;
        let proxy = match &self.proxy {
            Some(side) => {
                let mut items = self
                    .observe_side(side, Place::Proxy, &interest.proxy)
                    .await?;
                items.extend(
                    side.iptables
                        .observe(Table::Mangle, &side.netns)?
                        .map(Item::Chains),
                );
                items
            }
            None => BTreeSet::new(),
        };
        Ok(Datapath { host, proxy })
    }

    async fn observe_host(&self, interest: &BTreeSet<Item>) -> Result<BTreeSet<Item>, KernelError> {
        let side = &self.host;
        let mut items = self.observe_side(side, Place::Host, interest).await?;
        let peers = match &self.proxy {
            Some(proxy) => proxy.netlink.link_indices().await?,
            None => std::collections::BTreeMap::new(),
        };
        items.extend(side.netlink.host_links(&peers).await?);
        for table in [Table::Mangle, Table::Nat] {
            items.extend(side.iptables.observe(table, &side.netns)?.map(Item::Chains));
        }
        items.extend(ip_set::observe(&side.netns)?);
        Ok(items)
    }

    async fn observe_side(
        &self,
        side: &Side,
        place: Place,
        interest: &BTreeSet<Item>,
    ) -> Result<BTreeSet<Item>, KernelError> {
        let mut items = side.netlink.observe(place).await?;
        items.extend(sysctl::observe(&self.proc_root, &side.netns, interest)?);
        Ok(items)
    }

    /// Takes the steps of a plan, in order.
    ///
    /// # Errors
    /// At the first step that fails.
    pub async fn apply(&self, plan: &Plan) -> Result<(), ApplyError> {
        for step in &plan.steps {
            tracing::debug!(%step, "apply");
            self.take(step).await.map_err(|cause| ApplyError {
                step: Box::new(step.clone()),
                cause,
            })?;
        }
        Ok(())
    }

    async fn take(&self, step: &Step) -> Result<(), KernelError> {
        let side = match step.place {
            Place::Host => &self.host,
            Place::Proxy => self.proxy.as_ref().ok_or(KernelError::Detached)?,
        };
        let (old, new) = match &step.change {
            Change::Add(new) => (None, Some(new)),
            Change::Replace { old, new } => (Some(old), Some(new)),
            Change::Remove(old) => (Some(old), None),
        };
        match new.or(old) {
            Some(Item::Chains(_)) => side.iptables.replace(old, new, &side.netns)?,
            Some(Item::Set(_) | Item::Member(_)) => self.change_set(old, new)?,
            Some(Item::Sysctl(_)) => sysctl::write(&self.proc_root, &side.netns, old, new)?,
            _ => {
                side.netlink
                    .change(old, new, self.proxy.as_ref().map(|proxy| &proxy.netns))
                    .await?
            }
        }
        Ok(())
    }

    fn change_set(&self, old: Option<&Item>, new: Option<&Item>) -> Result<(), IpSetError> {
        let netns = &self.host.netns;
        match (old, new) {
            (None, Some(Item::Set(name))) => ip_set::create(netns, name),
            (Some(Item::Set(name)), None) => ip_set::destroy(netns, name),
            (None, Some(Item::Member(ip))) => ip_set::add(netns, *ip),
            (Some(Item::Member(ip)), None) => ip_set::remove(netns, *ip),
            _ => Ok(()),
        }
    }
}

impl Side {
    fn open(netns: Netns, place: Place, backend: IptablesBackend) -> Result<Self, KernelError> {
        let netlink = Netlink::open(&netns).map_err(|error| KernelError::Enter(place, error))?;
        Ok(Self {
            netns,
            netlink,
            iptables: Iptables::new(backend),
        })
    }
}
