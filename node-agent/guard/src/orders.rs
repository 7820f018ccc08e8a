//! What the agent orders of the plugin, in a file of the host.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::file;

/// Whom to hold, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Orders {
    /// Priority of the rules that hold.
    pub priority: u32,
    /// Route protocol of these rules, which says whose they are.
    pub protocol: u8,
    /// Folder of the records.
    pub records: PathBuf,
    /// Namespaces whose new pods are held.
    pub namespaces: BTreeSet<String>,
}

/// Orders that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum OrdersError {
    /// The file cannot be read.
    #[error("read {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// The file holds something else.
    #[error("{} does not hold orders: the node agent writes it anew when it runs", .0.display())]
    Parse(PathBuf, #[source] serde_json::Error),
    /// The file cannot be written.
    #[error("write {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
}

impl Orders {
    /// Reads them; none where no agent has ordered anything.
    ///
    /// # Errors
    /// If there is a file that holds no orders.
    pub fn read(path: &Path) -> Result<Option<Self>, OrdersError> {
        let content =
            file::read(path).map_err(|error| OrdersError::Read(path.to_owned(), error))?;
        content
            .map(|content| serde_json::from_slice(&content))
            .transpose()
            .map_err(|error| OrdersError::Parse(path.to_owned(), error))
    }

    /// Writes them, unless they are there already.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), OrdersError> {
        // What is there and cannot be read is written over.
        if Self::read(path).is_ok_and(|there| there.as_ref() == Some(self)) {
            return Ok(());
        }
        let write = || {
            let text = serde_json::to_vec_pretty(self)?;
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder)?;
            }
            file::replace(path, &text, 0o644)
        };
        write().map_err(|error| OrdersError::Write(path.to_owned(), error))
    }

    /// Withdraws them: from now on nobody is held.
    ///
    /// # Errors
    /// If the file cannot be removed.
    pub fn withdraw(path: &Path) -> Result<(), OrdersError> {
        file::remove(path).map_err(|error| OrdersError::Write(path.to_owned(), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_as_they_were_written_and_nonsense_is_told_from_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("below/guard.json");
        assert_eq!(Orders::read(&path).unwrap(), None);
        let orders = Orders {
            priority: 99,
            protocol: 90,
            records: "/run/ambit/held".into(),
            namespaces: ["shop".to_owned()].into(),
        };
        orders.write(&path).unwrap();
        assert_eq!(Orders::read(&path).unwrap(), Some(orders.clone()));
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(Orders::read(&path), Err(OrdersError::Parse(..))));
        orders.write(&path).unwrap();
        assert_eq!(Orders::read(&path).unwrap(), Some(orders));
        Orders::withdraw(&path).unwrap();
        Orders::withdraw(&path).unwrap();
        assert_eq!(Orders::read(&path).unwrap(), None);
    }
}
