//! What holds a data path: the real kernel, or a recorded one for tests.

pub mod generation;
pub mod ip_set;
pub mod iptables;
pub mod linux;
pub(crate) mod netfilter;
pub mod netlink;
pub mod recorded;
mod seen;
pub mod sysctl;
pub(crate) mod xtables;

use std::future::Future;

use crate::datapath::{Datapath, Place};
use crate::kernel::ip_set::IpSetError;
use crate::kernel::iptables::IptablesError;
use crate::kernel::netlink::NetlinkError;
use crate::kernel::sysctl::SysctlError;
use crate::netns::Netns;
use crate::plan::{Plan, Step};
use crate::slot::Slot;

pub use linux::LinuxKernel;

/// Something that holds a data path.
pub trait Kernel: Send + Sync {
    /// From now on the proxy of this slot is the one in this namespace.
    ///
    /// # Errors
    /// If it cannot be entered; the former one stays.
    fn attach(&mut self, slot: Slot, proxy: Netns) -> Result<(), KernelError>;

    /// From now on there is no proxy in this slot.
    fn detach(&mut self, slot: Slot);

    /// What is held of ours. Settings are read only where `interest` names them, and reported where
    /// they have its value.
    ///
    /// # Errors
    /// If something cannot be read.
    fn observe(
        &self,
        interest: &Datapath,
    ) -> impl Future<Output = Result<Datapath, KernelError>> + Send;

    /// As [`Kernel::observe`], but what nobody gives notice of is taken as it was last seen, unless
    /// it was written to since.
    ///
    /// # Errors
    /// If something cannot be read.
    fn glance(
        &self,
        interest: &Datapath,
    ) -> impl Future<Output = Result<Datapath, KernelError>> + Send;

    /// Takes the steps of a plan, in order.
    ///
    /// # Errors
    /// At the first step that fails; those before it are done.
    fn apply(&self, plan: &Plan) -> impl Future<Output = Result<(), ApplyError>> + Send;
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
