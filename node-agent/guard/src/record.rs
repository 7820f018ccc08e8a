//! Records of holds: the plugin writes one before it holds a pod, so that the agent knows whose hold it
//! finds. A hold without a record is nobody's.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::file;

/// A pod that is held, or was a moment ago.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Id of its sandbox at the container runtime.
    pub container: String,
    /// Its device.
    pub interface: String,
    /// Name of the CNI configuration it was added by.
    pub network: String,
    /// UID of the pod.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Index of the host's end of its device: when that is gone, so is the pod.
    pub index: u32,
    /// Device of the host that its packets come in by.
    pub device: String,
    /// Its addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// Priority of the rules that hold it.
    pub priority: u32,
    /// Route protocol of these rules.
    pub protocol: u8,
}

/// A record that could not be read, written or removed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The runtime gives a name that cannot be a file's.
    #[error("{0:?} is no name of a container or a device")]
    Name(String),
    /// The folder or a file cannot be read.
    #[error("read {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// A file holds something else.
    #[error("{} holds no record of a pod: remove it", .0.display())]
    Parse(PathBuf, #[source] serde_json::Error),
    /// A file cannot be written or removed.
    #[error("write {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
}

impl Record {
    /// Writes it.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), RecordError> {
        let path = path(folder, &self.container, &self.interface)?;
        let write = || {
            let text = serde_json::to_vec_pretty(self)?;
            std::fs::create_dir_all(folder)?;
            file::replace(&path, &text, 0o644)
        };
        write().map_err(|error| RecordError::Write(path.clone(), error))
    }

    /// Reads that of one device of one container; none if there is none.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(
        folder: &Path,
        container: &str,
        interface: &str,
    ) -> Result<Option<Self>, RecordError> {
        parse(&path(folder, container, interface)?)
    }

    /// Removes it, if it is there.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove(&self, folder: &Path) -> Result<(), RecordError> {
        let path = path(folder, &self.container, &self.interface)?;
        file::remove(&path).map_err(|error| RecordError::Write(path, error))
    }
}

/// Reads all of them.
///
/// # Errors
/// If one cannot be read.
pub fn all(folder: &Path) -> Result<Vec<Record>, RecordError> {
    let failed = |error| RecordError::Read(folder.to_owned(), error);
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut records = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        // What is being written has another name until it is whole.
        let is_hidden = path
            .file_stem()
            .is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if path.extension() == Some(OsStr::new("json")) && !is_hidden {
            records.extend(parse(&path)?);
        }
    }
    Ok(records)
}

fn parse(path: &Path) -> Result<Option<Record>, RecordError> {
    let content = file::read(path).map_err(|error| RecordError::Read(path.to_owned(), error))?;
    content
        .map(|content| serde_json::from_slice(&content))
        .transpose()
        .map_err(|error| RecordError::Parse(path.to_owned(), error))
}

/// Names as the CNI specification has them cannot lead out of the folder.
fn path(folder: &Path, container: &str, interface: &str) -> Result<PathBuf, RecordError> {
    for name in [container, interface] {
        let is_sign = |sign: char| sign.is_ascii_alphanumeric() || "_.-".contains(sign);
        let is_name = name.starts_with(|sign: char| sign.is_ascii_alphanumeric());
        if !is_name || !name.chars().all(is_sign) {
            return Err(RecordError::Name(name.to_owned()));
        }
    }
    Ok(folder.join(format!("{container}-{interface}.json")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(container: &str) -> Record {
        Record {
            container: container.to_owned(),
            interface: "eth0".to_owned(),
            network: "ambit".to_owned(),
            uid: "u".to_owned(),
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            index: 7,
            device: "veth7".to_owned(),
            addresses: ["10.0.0.4".parse().unwrap(), "fd00::4".parse().unwrap()].into(),
            priority: 99,
            protocol: 90,
        }
    }

    #[test]
    fn records_are_found_and_removed_one_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let below = folder.path().join("held");
        assert_eq!(all(&below).unwrap(), []);
        for container in ["a", "b"] {
            record(container).write(&below).unwrap();
        }
        std::fs::write(below.join(".c-eth0.json.ambit-new"), "{").unwrap();
        assert_eq!(all(&below).unwrap().len(), 2);
        assert_eq!(
            Record::read(&below, "a", "eth0").unwrap(),
            Some(record("a"))
        );
        record("a").remove(&below).unwrap();
        record("a").remove(&below).unwrap();
        assert_eq!(all(&below).unwrap(), [record("b")]);
    }

    #[test]
    fn no_name_leads_out_of_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["", "..", "../a", "a/b", ".a"] {
            assert!(record(name).write(folder.path()).is_err(), "{name}");
        }
    }
}
