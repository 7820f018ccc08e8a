//! The data path of one node: what the kernel should hold, what it holds, and the way between.
//!
//! ```text
//!  NodeInput ──build──▶ desired Datapath ─┐
//!                                         ├─plan─▶ Plan ──Kernel::apply──▶ kernel
//!  kernel ──Kernel::observe──▶ Datapath ──┘                                  │
//!     ▲──────────────────── changes (netlink notifications) ◀────────────────┘
//! ```
//!
//! `build` and `plan` are pure. Desired and observed state are the same type, and planning against
//! what was just applied gives an empty plan. Only what carries our names, tables, priorities and
//! route protocol is read or written.

pub mod attachment;
pub mod build;
pub mod changes;
pub mod datapath;
pub mod facts;
pub mod family;
pub mod input;
pub mod kernel;
pub mod names;
pub mod netns;
pub mod plan;
pub mod pod_devices;
pub mod set;
pub mod slot;

pub use build::{build, with_holds};
pub use datapath::{Datapath, Item, Place};
pub use family::Family;
pub use input::{FailureMode, Hold, IptablesBackend, Mark, MeshPod, NodeInput, TunnelKind};
pub use kernel::{Kernel, LinuxKernel};
pub use plan::{Plan, Step, plan};
pub use slot::{PerSlot, Slot};
