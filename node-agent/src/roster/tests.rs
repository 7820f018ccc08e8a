//! Whom the kernel uses, through the life of proxies.

use std::sync::Arc;

use datapath::netns::Netns;
use jiff::Timestamp;
use protocol::node::{ListenerReport, Workload, WorkloadReport, WorkloadState};
use tokio::sync::watch;

use super::*;

const PORTS: Ports = Ports {
    outbound: 15001,
    inbound: 15008,
    inbound_plaintext: 15006,
};

type Told = watch::Receiver<Option<Arc<Configure>>>;

fn session(id: SessionId) -> (Session, Told) {
    let (configure, told) = watch::channel(None);
    let identity = Identity {
        pod_name: format!("proxy-{id}"),
        pod_uid: id.to_string(),
        version: "1".to_owned(),
        created: Timestamp::UNIX_EPOCH,
        terminating: false,
    };
    let session = Session::new(id, identity, Netns::own(), None, configure);
    (session, told)
}

fn configure(uids: &[&str]) -> Configure {
    Configure {
        listeners: listeners(PORTS),
        workloads: uids
            .iter()
            .map(|uid| Workload {
                uid: (*uid).to_owned(),
                ..Workload::default()
            })
            .collect(),
        ..Configure::default()
    }
}

/// The report of every port that was told: it is bound.
pub(crate) fn bound(told: &Configure) -> Vec<ListenerReport> {
    let bound = |listener: &Listener| ListenerReport {
        port: listener.port,
        error: String::new(),
    };
    told.listeners.iter().map(bound).collect()
}

/// A report that says that all is well, for the generation last told.
fn all_well(told: &Told) -> Report {
    let told = told.borrow().clone().unwrap();
    Report {
        generation: told.generation,
        listeners: bound(&told),
        workloads: told
            .workloads
            .iter()
            .map(|workload| WorkloadReport {
                uid: workload.uid.clone(),
                state: WorkloadState::Ready.into(),
                message: String::new(),
            })
            .collect(),
        ending: false,
    }
}

fn with_one(uids: &[&str]) -> (Roster, Told) {
    let mut roster = Roster::new(100);
    let (session, told) = session(1);
    roster.take(SessionEvent::Attached(session));
    roster.choose(PORTS, &BTreeSet::new());
    roster.tell(&configure(uids));
    (roster, told)
}

#[test]
fn a_proxy_serves_once_it_says_that_every_port_is_bound() {
    let (mut roster, told) = with_one(&[]);
    assert!(!roster.current().unwrap().is_serving(PORTS));
    let mut report = all_well(&told);
    report.listeners[1].error = "address in use".to_owned();
    roster.take(SessionEvent::Reported(1, report));
    assert!(!roster.current().unwrap().is_serving(PORTS));
    roster.take(SessionEvent::Reported(1, all_well(&told)));
    assert!(roster.current().unwrap().is_serving(PORTS));
}

#[test]
fn the_same_state_is_told_once() {
    let (mut roster, mut told) = with_one(&["a"]);
    let first = told.borrow_and_update().clone().unwrap();
    assert!(first.generation > 100);
    roster.tell(&configure(&["a"]));
    assert!(!told.has_changed().unwrap());
    roster.tell(&configure(&["a", "b"]));
    assert!(told.borrow_and_update().clone().unwrap().generation > first.generation);
}

#[test]
fn an_answer_from_before_a_pod_came_back_does_not_count() {
    let (mut roster, told) = with_one(&["a"]);
    let old = all_well(&told);
    roster.take(SessionEvent::Reported(1, old.clone()));
    assert_eq!(roster.current().unwrap().workload("a"), Progress::Ready);
    roster.tell(&configure(&[]));
    roster.tell(&configure(&["a"]));
    assert_eq!(roster.current().unwrap().workload("a"), Progress::Waiting);
    roster.take(SessionEvent::Reported(1, old));
    assert_eq!(roster.current().unwrap().workload("a"), Progress::Waiting);
    roster.take(SessionEvent::Reported(1, all_well(&told)));
    assert_eq!(roster.current().unwrap().workload("a"), Progress::Ready);
}

#[test]
fn an_answer_to_an_earlier_agent_does_not_count() {
    let (mut roster, told) = with_one(&["a"]);
    let mut report = all_well(&told);
    report.generation = 57;
    roster.take(SessionEvent::Reported(1, report));
    assert!(!roster.current().unwrap().has_answered());
    assert_eq!(roster.current().unwrap().workload("a"), Progress::Waiting);
}

#[test]
fn a_new_proxy_is_used_when_it_is_prepared_and_not_before() {
    let (mut roster, told) = with_one(&["a"]);
    roster.take(SessionEvent::Reported(1, all_well(&told)));
    let (second, second_told) = session(2);
    roster.take(SessionEvent::Attached(second));
    let enrolled = BTreeSet::from(["a".to_owned()]);
    assert_eq!(roster.choose(PORTS, &enrolled).unwrap().id, 1);
    roster.tell(&configure(&["a"]));
    roster.take(SessionEvent::Reported(2, all_well(&second_told)));
    assert_eq!(roster.choose(PORTS, &enrolled).unwrap().id, 2);
    roster.take(SessionEvent::Detached(2));
    assert_eq!(roster.choose(PORTS, &enrolled).unwrap().id, 1);
}

#[test]
fn a_proxy_that_died_keeps_its_place_until_another_comes() {
    let (mut roster, told) = with_one(&["a"]);
    roster.take(SessionEvent::Reported(1, all_well(&told)));
    roster.take(SessionEvent::Detached(1));
    let kept = roster.choose(PORTS, &BTreeSet::new()).unwrap();
    assert_eq!(kept.id, 1);
    assert!(!kept.is_serving(PORTS));
    assert_eq!(kept.workload("a"), Progress::Waiting);
    roster.take(SessionEvent::Attached(session(2).0));
    assert_eq!(roster.choose(PORTS, &BTreeSet::new()).unwrap().id, 2);
}

/// A roster in which the first proxy serves.
fn served_by_one() -> (Roster, Told) {
    let (mut roster, told) = with_one(&["a"]);
    roster.take(SessionEvent::Reported(1, all_well(&told)));
    choose(&mut roster);
    (roster, told)
}

fn choose(roster: &mut Roster) -> Option<SessionId> {
    let enrolled = BTreeSet::from(["a".to_owned()]);
    roster.choose(PORTS, &enrolled).map(|session| session.id)
}

/// Another proxy comes, and is told and answers what there is.
fn comes(roster: &mut Roster, id: SessionId) -> Told {
    let (session, told) = session(id);
    roster.take(SessionEvent::Attached(session));
    roster.tell(&configure(&["a"]));
    roster.take(SessionEvent::Reported(id, all_well(&told)));
    told
}

fn seats(roster: &Roster) -> Vec<(Slot, SessionId)> {
    let seat = |slot| Some((slot, roster.in_slot(slot)?.id));
    Slot::BOTH.into_iter().filter_map(seat).collect()
}

fn duty(told: &Told) -> Duty {
    told.borrow().as_ref().unwrap().duty()
}

#[test]
fn the_old_proxy_keeps_its_slot_while_the_new_one_serves() {
    let (mut roster, told) = served_by_one();
    let second = comes(&mut roster, 2);
    assert_eq!(choose(&mut roster), Some(2));
    assert_eq!(seats(&roster), [(Slot::First, 1), (Slot::Second, 2)]);
    assert_eq!(roster.serving(PORTS), Some(Slot::Second));
    // Its process has ended, its namespace is there yet: its kernel answers.
    roster.take(SessionEvent::Detached(1));
    assert_eq!(choose(&mut roster), Some(2));
    assert_eq!(seats(&roster), [(Slot::First, 1), (Slot::Second, 2)]);
    roster.unseat(Slot::First);
    assert_eq!(seats(&roster), [(Slot::Second, 2)]);
    drop((told, second));
}

#[test]
fn each_proxy_is_told_whether_new_connections_come_to_it() {
    let (mut roster, told) = served_by_one();
    assert_eq!(duty(&told), Duty::Unspecified);
    roster.settle(roster.serving(PORTS));
    let second = comes(&mut roster, 2);
    assert_eq!((duty(&told), duty(&second)), (Duty::Active, Duty::Standby));
    choose(&mut roster);
    roster.tell(&configure(&["a"]));
    // The kernel has not been changed yet.
    assert_eq!((duty(&told), duty(&second)), (Duty::Active, Duty::Standby));
    roster.settle(roster.serving(PORTS));
    roster.tell(&configure(&["a"]));
    assert_eq!((duty(&told), duty(&second)), (Duty::Standby, Duty::Active));
}

#[test]
fn a_third_proxy_waits_until_a_slot_is_free() {
    let (mut roster, _told) = served_by_one();
    let _second = comes(&mut roster, 2);
    choose(&mut roster);
    let _third = comes(&mut roster, 3);
    assert_eq!(choose(&mut roster), Some(2));
    roster.take(SessionEvent::Detached(1));
    assert_eq!(choose(&mut roster), Some(3));
    assert_eq!(seats(&roster), [(Slot::First, 3), (Slot::Second, 2)]);
}

#[test]
fn a_proxy_that_ends_serves_until_another_is_prepared() {
    let (mut roster, told) = served_by_one();
    let mut ending = all_well(&told);
    ending.ending = true;
    roster.take(SessionEvent::Reported(1, ending));
    assert_eq!(choose(&mut roster), Some(1));
    let (session, _second) = session(2);
    roster.take(SessionEvent::Attached(session));
    assert_eq!(choose(&mut roster), Some(1));
    drop(told);
    let _third = comes(&mut roster, 3);
    assert_eq!(choose(&mut roster), Some(3));
}

#[test]
fn a_proxy_that_starts_again_in_its_pod_has_its_slot_again() {
    let (mut roster, _told) = served_by_one();
    let _second = comes(&mut roster, 2);
    choose(&mut roster);
    roster.take(SessionEvent::Detached(2));
    let (mut again, _told) = session(3);
    again.identity.pod_uid = "2".to_owned();
    roster.take(SessionEvent::Attached(again));
    choose(&mut roster);
    roster.take(SessionEvent::Detached(1));
    choose(&mut roster);
    assert_eq!(seats(&roster), [(Slot::First, 1), (Slot::Second, 3)]);
}

#[test]
fn an_agent_that_starts_again_gives_each_proxy_the_slot_it_had() {
    let mut roster = Roster::new(100);
    for (id, slot) in [(1, Slot::Second), (2, Slot::First)] {
        let (mut session, _told) = session(id);
        session.found = Some(slot);
        roster.take(SessionEvent::Attached(session));
    }
    choose(&mut roster);
    assert_eq!(seats(&roster), [(Slot::First, 2), (Slot::Second, 1)]);
}

#[test]
fn a_rejection_counts_until_a_proxy_is_let_in() {
    let mut roster = Roster::new(0);
    let rejected = Complaint {
        reason: crds::reasons::PROXY_REJECTED,
        message: "no such pod".to_owned(),
    };
    roster.take(SessionEvent::Rejected(rejected.clone()));
    assert_eq!(roster.rejection(), Some(&rejected));
    roster.take(SessionEvent::Attached(session(1).0));
    assert_eq!(roster.rejection(), None);
}
