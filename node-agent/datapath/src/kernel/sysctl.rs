//! Settings under `/proc/sys/net`, which shows the network namespace of the thread that opens it.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::datapath::{Item, Sysctl};
use crate::netns::Netns;

/// A setting that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// The namespace could not be entered.
    #[error("enter the network namespace to read settings")]
    Enter(#[source] io::Error),
    /// Reading failed.
    #[error("read {0}")]
    Read(PathBuf, #[source] io::Error),
    /// Writing failed.
    #[error("write {0}: mount /proc/sys/net writable for the agent (config/node-agent does)")]
    Write(PathBuf, #[source] io::Error),
}

/// The settings of `interest` that have its value.
pub(crate) fn observe(
    root: &Path,
    netns: &Netns,
    interest: &BTreeSet<Item>,
) -> Result<Vec<Item>, SysctlError> {
    let settings: Vec<&Sysctl> = interest
        .iter()
        .filter_map(|item| match item {
            Item::Sysctl(sysctl) => Some(sysctl),
            _ => None,
        })
        .collect();
    if settings.is_empty() {
        return Ok(Vec::new());
    }
    netns
        .run(|| {
            let mut found = Vec::new();
            for sysctl in settings {
                if read(&root.join(&sysctl.path))?.as_deref() == Some(sysctl.value.as_str()) {
                    found.push(Item::Sysctl(sysctl.clone()));
                }
            }
            Ok(found)
        })
        .map_err(SysctlError::Enter)?
}

/// The value of a setting below `root`, none if there is no such setting.
pub(crate) fn read(path: &Path) -> Result<Option<String>, SysctlError> {
    match fs::read_to_string(path) {
        Ok(value) => Ok(Some(value.trim_end().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(SysctlError::Read(path.to_owned(), error)),
    }
}

pub(super) fn write(
    root: &Path,
    netns: &Netns,
    old: Option<&Item>,
    new: Option<&Item>,
) -> Result<(), SysctlError> {
    let (path, value) = match (new, old) {
        (Some(Item::Sysctl(new)), _) => (root.join(&new.path), &new.value),
        (None, Some(Item::Sysctl(old))) => (root.join(&old.path), &old.restore),
        _ => return Ok(()),
    };
    netns
        .run(|| match fs::write(&path, value) {
            // The device went away, and its settings with it.
            Err(error) if error.kind() == io::ErrorKind::NotFound && new.is_none() => Ok(()),
            other => other.map_err(|error| SysctlError::Write(path.clone(), error)),
        })
        .map_err(SysctlError::Enter)?
}
