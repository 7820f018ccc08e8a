//! What is done about a call.

use std::path::PathBuf;

use guard::orders::{Orders, OrdersError};
use guard::record::{self, Record, RecordError};
use serde_json::Value;

use crate::answer;
use crate::call::{Addition, Attachment, Call, CallError, Command, Pod};
use crate::device::{self, DeviceError};
use crate::netlink::NetlinkError;
use crate::rules;

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ActError {
    #[error(transparent)]
    Call(#[from] CallError),
    /// Nobody knows who is in the mesh. The agent, which is on the host's network and needs no plugin,
    /// writes the file anew; until then no pod may start, for it might be one of the mesh.
    #[error(transparent)]
    Orders(#[from] OrdersError),
    #[error(
        "the container runtime does not tell the UID of pod {namespace}/{name}: containerd needs 1.5 or newer, CRI-O 1.20"
    )]
    NoUid { namespace: String, name: String },
    #[error(
        "find the host's end of the pod's device, to hold its traffic back until the mesh carries it"
    )]
    Device(#[from] DeviceError),
    #[error("hold the pod's traffic back by an ip rule until the mesh carries it")]
    Rules(#[from] NetlinkError),
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// Does it; what is to be answered.
pub(crate) fn act(call: &Call) -> Result<Option<Value>, ActError> {
    match &call.command {
        Command::Add(addition) => {
            add(call, addition)?;
            return Ok(Some(addition.result.clone()));
        }
        Command::Delete(attachment) => delete(call, attachment)?,
        Command::Collect { network, valid } => collect(call, network, valid)?,
        Command::Version => return Ok(Some(answer::versions(&call.version))),
        Command::Nothing => {}
    }
    Ok(None)
}

fn add(call: &Call, addition: &Addition) -> Result<(), ActError> {
    let Some(pod) = held(call, addition.pod.as_ref()) else {
        return Ok(());
    };
    let Some(orders) = Orders::read(&call.orders)? else {
        return Ok(());
    };
    if !orders.namespaces.contains(&pod.namespace) {
        return Ok(());
    }
    let record = record_of(&orders, addition, pod)?;
    record.write(&orders.records)?;
    rules::add(&record)?;
    // An agent that leaves withdraws its orders before it looks for holds for the last time.
    let stands = Orders::read(&call.orders)?;
    if stands.is_none_or(|orders| !orders.namespaces.contains(&pod.namespace)) {
        release(&record, &orders.records)?;
    }
    Ok(())
}

/// The pod, unless it is one that is never held: of a namespace that the mesh itself needs, or one that
/// kubelet has from a file. Those run without an API server, may be it, and have another UID there.
fn held<'a>(call: &Call, pod: Option<&'a Pod>) -> Option<&'a Pod> {
    let is_static = |pod: &Pod| pod.uid.as_ref().is_some_and(|uid| !uid.contains('-'));
    pod.filter(|pod| !call.unheld.contains(&pod.namespace) && !is_static(pod))
}

fn record_of(orders: &Orders, addition: &Addition, pod: &Pod) -> Result<Record, ActError> {
    let no_uid = || ActError::NoUid {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
    };
    let uid = pod.uid.clone().ok_or_else(no_uid)?;
    let Attachment {
        container,
        interface,
    } = addition.attachment.clone();
    let device = device::host_end(&addition.netns, &interface)?;
    Ok(Record {
        container,
        interface,
        network: addition.network.clone(),
        uid,
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        index: device.index,
        device: device.way_in,
        addresses: addition.addresses.iter().copied().collect(),
        priority: orders.priority,
        protocol: orders.protocol,
    })
}

/// A pod that was never held has no record.
fn delete(call: &Call, attachment: &Attachment) -> Result<(), ActError> {
    let records = records(call);
    let record = Record::read(&records, &attachment.container, &attachment.interface)?;
    record.map_or(Ok(()), |record| release(&record, &records))
}

fn collect(call: &Call, network: &str, valid: &[Attachment]) -> Result<(), ActError> {
    let records = records(call);
    for record in record::all(&records)? {
        let is_valid = valid.iter().any(|attachment| {
            attachment.container == record.container && attachment.interface == record.interface
        });
        if record.network == network && !is_valid {
            release(&record, &records)?;
        }
    }
    Ok(())
}

/// The record goes last: a rule without one is nobody's.
fn release(record: &Record, records: &std::path::Path) -> Result<(), ActError> {
    rules::remove(record)?;
    Ok(record.remove(records)?)
}

/// Orders that are gone or cannot be read do not keep a pod from ending.
fn records(call: &Call) -> PathBuf {
    let orders = Orders::read(&call.orders).ok().flatten();
    orders.map_or_else(|| guard::RECORDS.into(), |orders| orders.records)
}
