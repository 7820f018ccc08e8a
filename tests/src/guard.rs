//! Takes back what a test changed, also when the test fails.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;

use crate::cluster::Cluster;
use crate::manifest;

type Step = Box<dyn FnOnce() -> Result<()>>;

/// Runs its step once: when told to, or when dropped.
#[must_use = "dropped at once, it undoes at once"]
pub struct Undo(Option<Step>);

impl Undo {
    /// What is to be done at the end.
    pub fn new(step: impl FnOnce() -> Result<()> + 'static) -> Self {
        Self(Some(Box::new(step)))
    }

    /// Does it now.
    ///
    /// # Errors
    /// If it fails.
    pub fn now(mut self) -> Result<()> {
        self.0.take().map_or(Ok(()), |step| step())
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if let Some(step) = self.0.take()
            && let Err(error) = step()
        {
            // The test has failed already, and says why; this is one more thing to know.
            eprintln!("undo: {error:#}");
        }
    }
}

/// A namespace of one test; it goes with all that is in it.
#[derive(Debug)]
pub struct Namespace {
    cluster: Cluster,
    /// Its name.
    pub name: String,
}

impl Namespace {
    /// Makes it, with this value of the enrolment label.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn create(cluster: &Cluster, topic: &str, mode: Option<&str>) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{topic}-{}-{number}", std::process::id());
        cluster.apply(&manifest::namespace(&name, mode))?;
        Ok(Self {
            cluster: cluster.clone(),
            name,
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let deleted = self
            .cluster
            .kubectl(&["delete", "namespace", &self.name, "--wait=false"]);
        if let Err(error) = deleted {
            eprintln!("undo: {error:#}");
        }
    }
}
