//! Results as files of JSON, for programs to read.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// Writes a value, and makes the folder that it is to be in.
///
/// # Errors
/// If the value is no JSON or the file cannot be written.
pub fn write(path: &Path, value: &(impl Serialize + ?Sized)) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let json = serde_json::to_string_pretty(value)?;
    fs::write(path, json + "\n").with_context(|| format!("write {}", path.display()))
}
