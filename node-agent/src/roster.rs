//! The proxies that are connected, which of them has which of the node's two slots, and which one the
//! kernel should hand new connections to. Pure.
//!
//! ```text
//!  hello ─▶ standby ─▶ prepared: a slot, new connections ─▶ another is: keeps its own ─▶ gone
//! ```

mod session;

use std::collections::BTreeSet;

use datapath::input::Ports;
use datapath::{PerSlot, Slot};
use protocol::node::{Configure, Duty, Listener, Report};

use crate::failure::Complaint;

pub(crate) use session::{Identity, Progress, Session, SessionId};

/// What a connection brings.
#[derive(Debug)]
pub(crate) enum SessionEvent {
    /// A proxy said hello and is who it claims to be.
    Attached(Session),
    /// It answered.
    Reported(SessionId, Report),
    /// The connection is closed.
    Detached(SessionId),
    /// Someone said hello who is not this node's proxy.
    Rejected(Complaint),
}

/// Every proxy that is connected, and those that have a slot.
#[derive(Debug)]
pub(crate) struct Roster {
    /// In the order of their hellos. Who has a slot stays here after its connection is closed: a proxy
    /// that starts again in the same pod finds its devices in place, and the kernel of its namespace
    /// answers for what it carried.
    sessions: Vec<Session>,
    seats: PerSlot<Option<SessionId>>,
    current: Option<SessionId>,
    /// Whom the kernel hands new connections to, once that is known.
    active: Option<Option<SessionId>>,
    rejection: Option<Complaint>,
    generation: u64,
}

impl Roster {
    /// Nobody. Generations begin after `first`: an answer to an earlier agent must be older than
    /// every question of this one.
    pub(crate) fn new(first: u64) -> Self {
        Self {
            sessions: Vec::new(),
            seats: PerSlot::default(),
            current: None,
            active: None,
            rejection: None,
            generation: first,
        }
    }

    /// Takes note of what a connection brought.
    pub(crate) fn take(&mut self, event: SessionEvent) {
        match event {
            SessionEvent::Attached(session) => {
                self.rejection = None;
                self.sessions.push(session);
            }
            SessionEvent::Reported(id, report) => {
                if let Some(session) = self.session_mut(id) {
                    session.report = Some(report);
                }
            }
            SessionEvent::Detached(id) => {
                if let Some(session) = self.session_mut(id) {
                    session.connected = false;
                }
                self.tidy();
            }
            SessionEvent::Rejected(why) => self.rejection = Some(why),
        }
    }

    /// Why the last one who said hello was turned away, until another is let in.
    pub(crate) fn rejection(&self) -> Option<&Complaint> {
        self.rejection.as_ref()
    }

    /// Chooses the proxy that is to take new connections, and gives it a slot.
    pub(crate) fn choose(&mut self, ports: Ports, enrolled: &BTreeSet<String>) -> Option<&Session> {
        self.seat_found();
        let chosen = self.best(ports, enrolled).map(|session| session.id);
        let seat = chosen
            .and_then(|id| self.session(id))
            .and_then(|session| self.seat_for(session));
        if let (Some(id), Some(slot)) = (chosen, seat) {
            self.seats[slot] = Some(id);
        }
        self.current = chosen;
        self.tidy();
        self.current()
    }

    /// The newest that is prepared and does not end; until then the one in use while it lives; else the
    /// newest.
    fn best(&self, ports: Ports, enrolled: &BTreeSet<String>) -> Option<&Session> {
        let is_prepared = |session: &Session| {
            session.is_serving(ports)
                && enrolled
                    .iter()
                    .all(|uid| session.workload(uid) == Progress::Ready)
        };
        let is_current = |session: &Session| Some(session.id) == self.current;
        // While both slots are taken the third one waits: there it would cut connections.
        let newest = |wanted: &dyn Fn(&Session) -> bool| {
            self.sessions
                .iter()
                .filter(|session| wanted(session) && self.seat_for(session).is_some())
                .max_by_key(|session| session.age())
        };
        newest(&|session| is_prepared(session) && !session.is_ending())
            .or_else(|| newest(&|session| is_current(session) && session.connected))
            .or_else(|| newest(&is_prepared))
            .or_else(|| newest(&|session| session.connected && !session.is_ending()))
            .or_else(|| newest(&|session| session.connected))
            .or_else(|| newest(&|_| true))
    }

    /// Who had a slot under an earlier agent has it again.
    fn seat_found(&mut self) {
        for slot in Slot::BOTH {
            if self.seats[slot].is_none() {
                let found = self.sessions.iter().find(|session| {
                    session.found == Some(slot) && self.seat_of(session.id).is_none()
                });
                self.seats[slot] = found.map(|session| session.id);
            }
        }
    }

    /// The slot that a proxy has or could have without cutting what another carries.
    fn seat_for(&self, session: &Session) -> Option<Slot> {
        let first =
            |wanted: &dyn Fn(Slot) -> bool| Slot::BOTH.into_iter().find(|slot| wanted(*slot));
        let is_of_its_pod = |slot| {
            self.in_slot(slot)
                .is_some_and(|holder| holder.identity.pod_uid == session.identity.pod_uid)
        };
        let is_dead = |slot| self.in_slot(slot).is_some_and(|holder| !holder.connected);
        self.seat_of(session.id)
            .or_else(|| first(&is_of_its_pod))
            .or_else(|| first(&|slot| self.seats[slot].is_none()))
            .or_else(|| first(&|slot| is_dead(slot) && self.seats[slot] != self.current))
            .or_else(|| first(&is_dead))
    }

    fn seat_of(&self, id: SessionId) -> Option<Slot> {
        Slot::BOTH
            .into_iter()
            .find(|slot| self.seats[*slot] == Some(id))
    }

    /// The proxy of a slot.
    pub(crate) fn in_slot(&self, slot: Slot) -> Option<&Session> {
        self.seats[slot].and_then(|id| self.session(id))
    }

    /// The proxy that is to take new connections.
    pub(crate) fn current(&self) -> Option<&Session> {
        self.current.and_then(|id| self.session(id))
    }

    /// Its slot.
    pub(crate) fn current_slot(&self) -> Option<Slot> {
        self.current.and_then(|id| self.seat_of(id))
    }

    /// The slot of the current proxy, if that takes connections.
    pub(crate) fn serving(&self, ports: Ports) -> Option<Slot> {
        let current = self.current().filter(|session| session.is_serving(ports))?;
        self.seat_of(current.id)
    }

    /// Lets go of the proxy of a slot: its namespace cannot be used.
    pub(crate) fn unseat(&mut self, slot: Slot) {
        self.seats[slot] = None;
        self.tidy();
    }

    /// The kernel hands new connections to the proxy of this slot, or to none.
    pub(crate) fn settle(&mut self, serving: Option<Slot>) {
        self.active = Some(serving.and_then(|slot| self.seats[slot]));
    }

    /// Tells every connected proxy what to do: always everything.
    pub(crate) fn tell(&mut self, wanted: &Configure) {
        let next = self.generation + 1;
        let mut told = false;
        for session in &mut self.sessions {
            let duty = match self.active {
                None => Duty::Unspecified,
                Some(active) if active == Some(session.id) => Duty::Active,
                Some(_) => Duty::Standby,
            };
            let wanted = Configure {
                duty: duty.into(),
                ..wanted.clone()
            };
            told |= session.tell(&wanted, next);
        }
        if told {
            self.generation = next;
        }
    }

    /// Forgets who is gone and has no slot.
    fn tidy(&mut self) {
        let seats = self.seats;
        self.sessions.retain(|session| {
            session.connected
                || Slot::BOTH
                    .iter()
                    .any(|slot| seats[*slot] == Some(session.id))
        });
    }

    fn session(&self, id: SessionId) -> Option<&Session> {
        self.sessions.iter().find(|session| session.id == id)
    }

    fn session_mut(&mut self, id: SessionId) -> Option<&mut Session> {
        self.sessions.iter_mut().find(|session| session.id == id)
    }
}

/// The listeners of these ports.
pub(crate) fn listeners(ports: Ports) -> Vec<Listener> {
    use protocol::node::ListenerKind::{Inbound, InboundPlaintext, Outbound};
    [
        (Outbound, ports.outbound),
        (Inbound, ports.inbound),
        (InboundPlaintext, ports.inbound_plaintext),
    ]
    .map(|(kind, port)| Listener {
        kind: kind.into(),
        port: port.into(),
    })
    .into()
}

#[cfg(test)]
pub(crate) mod tests;
