//! Pure: what a pod belongs to, from its owner reference.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use protocol::workload::WorkloadType;

/// Label that holds the part of a ReplicaSet's name that its Deployment added.
const POD_TEMPLATE_HASH: &str = "pod-template-hash";

/// The workload that a pod is an instance of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) kind: WorkloadType,
    pub(crate) name: Arc<str>,
}

impl Owner {
    /// The Deployment of a ReplicaSet and the CronJob of a Job are recognised by name, so that
    /// neither needs to be watched.
    pub(crate) fn parse(meta: &ObjectMeta) -> Self {
        let controller = meta
            .owner_references
            .iter()
            .flatten()
            .find(|owner| owner.controller == Some(true));
        let Some(owner) = controller else {
            return Self::new(WorkloadType::Pod, meta.name.as_deref().unwrap_or_default());
        };
        let name = owner.name.as_str();
        match owner.kind.as_str() {
            "ReplicaSet" => {
                let hash = meta
                    .labels
                    .as_ref()
                    .and_then(|labels| labels.get(POD_TEMPLATE_HASH));
                match hash.and_then(|hash| name.strip_suffix(hash.as_str())?.strip_suffix('-')) {
                    Some(deployment) => Self::new(WorkloadType::Deployment, deployment),
                    None => Self::new(WorkloadType::Pod, name),
                }
            }
            "Job" => match cron_job(name) {
                Some(cron_job) => Self::new(WorkloadType::Cronjob, cron_job),
                None => Self::new(WorkloadType::Job, name),
            },
            _ => Self::new(WorkloadType::Pod, name),
        }
    }

    fn new(kind: WorkloadType, name: &str) -> Self {
        Self {
            kind,
            name: name.into(),
        }
    }
}

/// A CronJob names its Jobs `NAME-MINUTES`, in minutes since 1970.
fn cron_job(job: &str) -> Option<&str> {
    let (name, minutes) = job.rsplit_once('-')?;
    let is_time =
        (8..=10).contains(&minutes.len()) && minutes.bytes().all(|byte| byte.is_ascii_digit());
    is_time.then_some(name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

    use super::*;

    fn owner_of(kind: &str, name: &str, hash: Option<&str>) -> Owner {
        Owner::parse(&ObjectMeta {
            name: Some("pod-1".to_owned()),
            labels: hash.map(|hash| BTreeMap::from([(POD_TEMPLATE_HASH.into(), hash.into())])),
            owner_references: Some(vec![OwnerReference {
                kind: kind.to_owned(),
                name: name.to_owned(),
                controller: Some(true),
                ..OwnerReference::default()
            }]),
            ..ObjectMeta::default()
        })
    }

    #[test]
    fn the_hash_of_a_replica_set_is_stripped() {
        assert_eq!(
            owner_of("ReplicaSet", "web-7d9c", Some("7d9c")),
            Owner::new(WorkloadType::Deployment, "web")
        );
    }

    #[test]
    fn a_replica_set_of_its_own_keeps_its_name() {
        assert_eq!(
            owner_of("ReplicaSet", "web-7d9c", None),
            Owner::new(WorkloadType::Pod, "web-7d9c")
        );
    }

    #[test]
    fn a_job_with_minutes_in_its_name_belongs_to_a_cron_job() {
        assert_eq!(
            owner_of("Job", "backup-28123456", None),
            Owner::new(WorkloadType::Cronjob, "backup")
        );
        assert_eq!(
            owner_of("Job", "backup-1", None),
            Owner::new(WorkloadType::Job, "backup-1")
        );
    }

    #[test]
    fn a_pod_without_owner_is_its_own_workload() {
        let owner = Owner::parse(&ObjectMeta {
            name: Some("alone".to_owned()),
            ..ObjectMeta::default()
        });
        assert_eq!(owner, Owner::new(WorkloadType::Pod, "alone"));
    }
}
