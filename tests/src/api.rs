//! Requests to the API server that kubectl does not make, or not for others than itself.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;
use tempfile::TempDir;

use crate::cluster::Cluster;
use crate::command;

/// Somebody with an account at the API server.
#[derive(Debug)]
pub struct Caller {
    server: String,
    credentials: Vec<String>,
    /// Files that the credentials are in.
    _files: TempDir,
}

impl Caller {
    /// The administrator, by certificate.
    ///
    /// # Errors
    /// If the configuration cannot be read.
    pub fn administrator(cluster: &Cluster) -> Result<Self> {
        Self::new(cluster, |files| {
            Ok(vec![
                "--cert".to_owned(),
                files.write("cert", "{.users[0].user.client-certificate-data}")?,
                "--key".to_owned(),
                files.write("key", "{.users[0].user.client-key-data}")?,
            ])
        })
    }

    /// Who has this token.
    ///
    /// # Errors
    /// If the configuration cannot be read.
    pub fn with_token(cluster: &Cluster, token: &str) -> Result<Self> {
        let header = format!("Authorization: Bearer {token}");
        Self::new(cluster, |_| Ok(vec!["-H".to_owned(), header]))
    }

    fn new(cluster: &Cluster, own: impl FnOnce(&Files<'_>) -> Result<Vec<String>>) -> Result<Self> {
        let folder = TempDir::new()?;
        let files = Files {
            cluster,
            folder: &folder,
        };
        let ca = files.write("ca", "{.clusters[0].cluster.certificate-authority-data}")?;
        let mut credentials = vec!["--cacert".to_owned(), ca];
        credentials.extend(own(&files)?);
        Ok(Self {
            server: files.field("{.clusters[0].cluster.server}")?,
            credentials,
            _files: folder,
        })
    }

    /// A merge patch, tried only; the object as it would be, or the Status of a refusal.
    ///
    /// # Errors
    /// If there is no answer.
    pub fn try_patch(&self, path: &str, headers: &[&str], patch: &str) -> Result<Value> {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "-X", "PATCH", "-d", patch])
            .args(&self.credentials);
        for header in ["Content-Type: application/merge-patch+json"]
            .iter()
            .chain(headers)
        {
            curl.args(["-H", header]);
        }
        let answer = command::run(curl.arg(format!("{}{path}?dryRun=All", self.server)), "")?;
        let answer = answer.success().with_context(|| format!("PATCH {path}"))?;
        serde_json::from_str(&answer).with_context(|| answer)
    }
}

struct Files<'a> {
    cluster: &'a Cluster,
    folder: &'a TempDir,
}

impl Files<'_> {
    fn field(&self, path: &str) -> Result<String> {
        let path = format!("jsonpath={path}");
        self.cluster
            .kubectl(&["config", "view", "--raw", "--flatten", "-o", &path])
    }

    /// Writes a field of the configuration into a file; its path.
    fn write(&self, name: &str, field: &str) -> Result<String> {
        let mut base64 = Command::new("base64");
        let text = command::run(base64.arg("-d"), &self.field(field)?)?.success()?;
        let path = self.folder.path().join(name);
        fs::write(&path, text)?;
        Ok(path.to_string_lossy().into_owned())
    }
}
