//! The step from the roster to the namespaces that the kernel is to work in.

use std::error::Error;

use crds::reasons;
use datapath::attachment::{self, Attachment};
use datapath::changes::Changes;
use datapath::kernel::Kernel;
use datapath::netns::Netns;
use datapath::{PerSlot, Slot};

use super::Node;
use crate::failure::{Complaint, chain};
use crate::report::ProxyState;
use crate::roster::{Identity, Roster, SessionId};

/// A namespace that the kernel works in.
#[derive(Debug)]
pub(super) struct Attached {
    session: SessionId,
    changes: Changes,
}

/// A proxy that has a slot.
struct Seated {
    session: SessionId,
    identity: Identity,
    netns: Netns,
    connected: bool,
}

impl Node {
    /// Looks at the namespaces of the proxies that have a slot, and makes them the kernel's; the state
    /// of the current one.
    pub(super) async fn attach(
        &mut self,
        roster: &mut Roster,
    ) -> (ProxyState, PerSlot<Option<Attachment>>) {
        let mut attachments = PerSlot::default();
        let mut state = ProxyState::Absent;
        let current = roster.current().map(|session| session.id);
        for slot in Slot::BOTH {
            let Some(seated) = seated(roster, slot) else {
                self.detach(slot);
                continue;
            };
            let is_current = current == Some(seated.session);
            match self.enter(slot, &seated).await {
                Ok(attachment) => {
                    // One that is not connected may start again in the same pod: its devices stay.
                    if is_current && seated.connected {
                        state = ProxyState::Attached(seated.identity, attachment.clone());
                    }
                    attachments[slot] = Some(attachment);
                }
                Err(why) => {
                    self.detach(slot);
                    if is_current && seated.connected {
                        state = ProxyState::Unusable(why);
                    } else {
                        roster.unseat(slot);
                    }
                }
            }
        }
        (state, attachments)
    }

    async fn enter(&mut self, slot: Slot, seated: &Seated) -> Result<Attachment, Complaint> {
        let host = &self.host;
        let attachment = attachment::find(&host.netns, &seated.netns, &host.sysctl_root)
            .await
            .map_err(|error| Complaint::unusable(&error))?;
        self.work_in(slot, seated)?;
        Ok(attachment)
    }

    /// Makes a namespace the kernel's, and listens for changes of it.
    fn work_in(&mut self, slot: Slot, seated: &Seated) -> Result<(), Complaint> {
        let is_same = self.attached[slot].as_ref().is_some_and(|attached| {
            attached.session == seated.session && attached.changes.is_listening()
        });
        let (Some(kernel), false) = (&mut self.kernel, is_same) else {
            return Ok(());
        };
        kernel
            .attach(slot, seated.netns.clone())
            .map_err(|error| unusable(&error))?;
        let changes =
            Changes::listen(&seated.netns, self.wake.clone()).map_err(|error| unusable(&error))?;
        self.attached[slot] = Some(Attached {
            session: seated.session,
            changes,
        });
        Ok(())
    }

    fn detach(&mut self, slot: Slot) {
        self.attached[slot] = None;
        if let Some(kernel) = &mut self.kernel {
            kernel.detach(slot);
        }
    }
}

fn unusable(error: &dyn Error) -> Complaint {
    Complaint {
        reason: reasons::PROXY_UNUSABLE,
        message: chain(error),
    }
}

fn seated(roster: &Roster, slot: Slot) -> Option<Seated> {
    roster.in_slot(slot).map(|session| Seated {
        session: session.id,
        identity: session.identity.clone(),
        netns: session.netns.clone(),
        connected: session.is_connected(),
    })
}
