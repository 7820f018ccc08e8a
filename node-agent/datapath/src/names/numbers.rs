//! The numbers of our route tables and rules on the host, counted from the first of each.

use super::{Names, PRIORITIES, TABLES};
use crate::slot::Slot;

impl Names {
    /// Route table of traffic to mesh pods.
    #[must_use]
    pub fn table_inbound(&self) -> u32 {
        self.first_table
    }

    /// Route table of traffic from mesh pods.
    #[must_use]
    pub fn table_outbound(&self) -> u32 {
        self.first_table + 1
    }

    /// Route table of answers to what the proxy of a slot dialled.
    #[must_use]
    pub fn table_return(&self, slot: Slot) -> u32 {
        match slot {
            Slot::First => self.first_table + 2,
            Slot::Second => self.first_table + 3,
        }
    }

    /// Our route tables on the host.
    pub fn tables(&self) -> impl Iterator<Item = u32> {
        self.first_table..self.first_table + TABLES
    }

    /// Whether a route table of the host is ours.
    #[must_use]
    pub fn is_table(&self, table: u32) -> bool {
        self.tables().any(|ours| ours == table)
    }

    /// Priority: TCP of a pod that waits to be carried goes nowhere; before everything else of ours,
    /// and after the kernel's rule for what is for the host itself.
    #[must_use]
    pub fn priority_hold(&self) -> u32 {
        self.first_priority - 1
    }

    /// Priority: what carries the skip mark goes on at the main table's rule.
    #[must_use]
    pub fn priority_skip(&self) -> u32 {
        self.first_priority
    }

    /// Priority: what carries the outbound mark goes to the proxy.
    #[must_use]
    pub fn priority_outbound(&self) -> u32 {
        self.first_priority + 1
    }

    /// Priority: what carries the return mark of a slot goes back to its proxy; two rules.
    #[must_use]
    pub fn priority_return(&self) -> u32 {
        self.first_priority + 2
    }

    /// Priority: what the host itself sends passes over [`Self::priority_inbound`].
    #[must_use]
    pub fn priority_host(&self) -> u32 {
        self.first_priority + 3
    }

    /// Priority: forwarded TCP to mesh pods goes to the proxy.
    #[must_use]
    pub fn priority_inbound(&self) -> u32 {
        self.first_priority + 4
    }

    /// Priority: where [`Self::priority_host`] goes on.
    #[must_use]
    pub fn priority_host_end(&self) -> u32 {
        self.first_priority + 5
    }

    /// Whether a rule of the host has one of our priorities.
    #[must_use]
    pub fn is_priority(&self, priority: u32) -> bool {
        (self.priority_hold()..self.first_priority + PRIORITIES).contains(&priority)
    }
}
