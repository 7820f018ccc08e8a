//! Publishes the CA's roots as a ConfigMap, for proxies to know the controller by.

use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Patch, PatchParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;

use super::secret::CurrentCa;
use crate::problems::{Problems, explain};
use crate::watch::backoff;

const PART: &str = "publish roots";
const WATCH_PART: &str = "watch the configmap of the roots";

/// Key in the ConfigMap.
const KEY: &str = "root-cert.pem";

/// Between two attempts.
const RETRY: Duration = Duration::from_secs(5);

/// Keeps the ConfigMap, while this replica leads.
pub(crate) struct RootPublisher {
    api: Api<ConfigMap>,
    name: String,
    ca: CurrentCa,
    leading: watch::Receiver<bool>,
    problems: Problems,
    /// Whether the ConfigMap has been looked at.
    known: bool,
    /// What it holds.
    published: Option<String>,
}

impl RootPublisher {
    pub(crate) fn new(
        client: Client,
        (namespace, name): (&str, &str),
        ca: CurrentCa,
        leading: watch::Receiver<bool>,
        problems: Problems,
    ) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            name: name.to_owned(),
            ca,
            leading,
            problems,
            known: false,
            published: None,
        }
    }

    /// Runs until the process ends.
    pub(crate) async fn run(mut self) {
        let one = Config::default().fields(&format!("metadata.name={}", self.name));
        let mut events = std::pin::pin!(watcher(self.api.clone(), one).backoff(backoff()));
        loop {
            let written = self.publish().await;
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(event)) => self.observe(event),
                    Some(Err(error)) => self.problems.report_watch(WATCH_PART, &error),
                    None => return,
                },
                Ok(()) = self.ca.changed() => {}
                Ok(()) = self.leading.changed() => {}
                () = tokio::time::sleep(RETRY), if !written => {}
            }
        }
    }

    fn observe(&mut self, event: Event<ConfigMap>) {
        if !matches!(event, Event::Init) {
            self.problems.clear(WATCH_PART);
        }
        match event {
            Event::Apply(map) | Event::InitApply(map) => {
                self.published = map.data.and_then(|mut data| data.remove(KEY));
            }
            Event::Delete(_) => self.published = None,
            Event::Init => {
                self.known = false;
                self.published = None;
            }
            Event::InitDone => self.known = true,
        }
    }

    /// Whether nothing is left to write.
    async fn publish(&mut self) -> bool {
        let roots = self.ca.borrow_and_update().roots_pem();
        let leading = *self.leading.borrow_and_update();
        if !leading || !self.known || self.published.as_ref() == Some(&roots) {
            return true;
        }
        let object = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": self.name},
            "data": {KEY: roots},
        });
        let params = PatchParams::apply(crds::CONTROLLER_MANAGER).force();
        match self
            .api
            .patch(&self.name, &params, &Patch::Apply(object))
            .await
        {
            Ok(_) => {
                self.problems.clear(PART);
                tracing::info!(config_map = self.name, "published the roots");
                self.published = Some(roots);
                true
            }
            Err(error) => {
                self.problems.report(
                    PART,
                    format!("ConfigMap {}: {}", self.name, explain(&error)),
                );
                false
            }
        }
    }
}
