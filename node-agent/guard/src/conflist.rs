//! A CNI configuration with the plugin at its end, and without it. Pure; text in, text out: whatever
//! else is in it stays byte for byte as somebody wrote it.

use std::ops::Range;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Deserializer, json};

use crate::PROGRAM;

/// What the plugin is told by its entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// File of the agent's orders.
    pub orders: String,
    /// Namespaces whose pods are never held, whatever the file says.
    pub unheld: Vec<String>,
}

/// A configuration that cannot be changed.
#[derive(Debug, thiserror::Error)]
pub enum ConflistError {
    /// It is no JSON, or not of this shape.
    #[error("it is no CNI configuration")]
    Parse(#[from] serde_json::Error),
    /// It has no plugin.
    #[error("it has no plugins")]
    Empty,
    /// Its version knows no chains.
    #[error("its cniVersion {0:?} knows no chains of plugins: they need 0.3.0 or newer")]
    Version(String),
}

#[derive(Deserialize)]
struct List {
    plugins: Vec<Plugin>,
}

#[derive(Deserialize)]
struct Plugin {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Single {
    #[serde(rename = "cniVersion", default)]
    version: String,
    #[serde(default)]
    name: String,
}

/// Kinds of the plugins of a list, in order: each is the name of a program.
///
/// # Errors
/// If it is no list.
pub fn kinds(list: &str) -> Result<Vec<String>, ConflistError> {
    let List { plugins } = serde_json::from_str(list)?;
    Ok(plugins.into_iter().map(|plugin| plugin.kind).collect())
}

/// The list with the plugin once, at its end; the same text if it is there already.
///
/// # Errors
/// If it is no list of at least one other plugin.
pub fn with(list: &str, entry: &Entry) -> Result<String, ConflistError> {
    let without = without(list)?;
    kinds(&without)?;
    let places = places(&without)?;
    let end = places.last().ok_or(ConflistError::Empty)?.end;
    let entry = json!({
        "type": PROGRAM,
        "orders": entry.orders,
        "unheld": entry.unheld,
    });
    let (before, after) = without.split_at(end);
    Ok(format!("{before},\n    {entry}{after}"))
}

/// The list without the plugin; the same text if it is not there.
///
/// # Errors
/// If it is no list.
pub fn without(list: &str) -> Result<String, ConflistError> {
    let mut text = list.to_owned();
    while let Some(place) = place(&text)? {
        text.replace_range(place, "");
    }
    Ok(text)
}

/// A list of one plugin's own configuration, for versions before lists were the rule.
///
/// # Errors
/// If there are no chains in its version.
pub fn of_single(single: &str) -> Result<String, ConflistError> {
    let Single { version, name } = serde_json::from_str(single)?;
    if ["", "0.1.0", "0.2.0"].contains(&version.as_str()) {
        return Err(ConflistError::Version(version));
    }
    let (version, name) = (json!(version), json!(name));
    Ok(format!(
        "{{\n  \"cniVersion\": {version},\n  \"name\": {name},\n  \"plugins\": [\n    {}\n  ]\n}}\n",
        single.trim()
    ))
}

/// Where our first entry is, with the comma that joins it to its neighbour.
fn place(list: &str) -> Result<Option<Range<usize>>, ConflistError> {
    let index = kinds(list)?.iter().position(|kind| kind == PROGRAM);
    let places = places(list)?;
    Ok(index.and_then(|index| {
        let own = places.get(index)?;
        let before = index.checked_sub(1).and_then(|index| places.get(index));
        Some(match (before, places.get(index + 1)) {
            (Some(before), _) => before.end..own.end,
            (None, Some(after)) => own.start..after.start,
            (None, None) => own.clone(),
        })
    }))
}

/// Where each plugin's entry is in the text of a list, which has been parsed before.
fn places(list: &str) -> Result<Vec<Range<usize>>, ConflistError> {
    let mut at = skip(list, 0) + 1;
    loop {
        at = skip(list, at);
        if list[at..].starts_with('}') || at >= list.len() {
            return Ok(Vec::new());
        }
        let key = at..end(list, at)?;
        at = skip(list, key.end);
        if serde_json::from_str::<String>(&list[key])? == "plugins" {
            return elements(list, at);
        }
        at = end(list, at)?;
    }
}

fn elements(list: &str, array: usize) -> Result<Vec<Range<usize>>, ConflistError> {
    let mut all = Vec::new();
    let mut at = skip(list, array + 1);
    while at < list.len() && !list[at..].starts_with(']') {
        let end = end(list, at)?;
        all.push(at..end);
        at = skip(list, end);
    }
    Ok(all)
}

/// The next place that is neither space nor what separates values.
fn skip(list: &str, from: usize) -> usize {
    let rest = list.get(from..).unwrap_or_default();
    let is_between = |sign: char| sign.is_ascii_whitespace() || sign == ',' || sign == ':';
    from + rest.len() - rest.trim_start_matches(is_between).len()
}

/// Where the value that begins here ends.
fn end(list: &str, start: usize) -> Result<usize, ConflistError> {
    let mut values = Deserializer::from_str(&list[start..]).into_iter::<IgnoredAny>();
    match values.next() {
        Some(value) => value.map(drop)?,
        None => return Err(ConflistError::Empty),
    }
    Ok(start + values.byte_offset())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "{\n\t\"name\" : \"x\",  \"cniVersion\":\"0.3.1\",\n  \"plugins\": [ {\"type\": \"ptp\", \"a\": [1, {\"type\":\"]\"}]},\n {\"type\":\"portmap\"}\n ] ,\"disableCheck\":true}\n\n";

    fn entry() -> Entry {
        Entry {
            orders: "/var/lib/ambit/guard.json".to_owned(),
            unheld: vec!["ambit-system".to_owned()],
        }
    }

    #[test]
    fn the_plugin_comes_last_and_goes_without_a_trace() {
        let with_it = with(LIST, &entry()).unwrap();
        assert_eq!(kinds(&with_it).unwrap(), ["ptp", "portmap", "ambit-cni"]);
        assert_eq!(with(&with_it, &entry()).unwrap(), with_it);
        assert_eq!(without(&with_it).unwrap(), LIST);
        assert_eq!(without(LIST).unwrap(), LIST);
    }

    #[test]
    fn what_somebody_adds_behind_it_or_changes_of_it_is_put_right() {
        let with_it = with(LIST, &entry()).unwrap();
        let behind = with_it.replace("\n ] ,", ", {\"type\":\"bandwidth\"}\n ] ,");
        let mended = with(&behind, &entry()).unwrap();
        assert_eq!(
            kinds(&mended).unwrap(),
            ["ptp", "portmap", "bandwidth", "ambit-cni"]
        );
        let other = Entry {
            unheld: Vec::new(),
            ..entry()
        };
        assert_eq!(
            with(&with(LIST, &other).unwrap(), &entry()).unwrap(),
            with_it
        );
    }

    #[test]
    fn a_list_that_was_written_anew_by_a_program_still_loses_it() {
        let value: serde_json::Value =
            serde_json::from_str(&with(LIST, &entry()).unwrap()).unwrap();
        let rewritten = serde_json::to_string_pretty(&value).unwrap();
        let left = without(&rewritten).unwrap();
        assert_eq!(kinds(&left).unwrap(), ["ptp", "portmap"]);
        let before: serde_json::Value = serde_json::from_str(LIST).unwrap();
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&left).unwrap(),
            before
        );
    }

    #[test]
    fn the_first_and_the_only_entry_can_be_removed_too() {
        let first = r#"{"plugins": [{"type":"ambit-cni"}, {"type":"ptp"}]}"#;
        assert_eq!(without(first).unwrap(), r#"{"plugins": [{"type":"ptp"}]}"#);
        let only = r#"{"plugins": [{"type":"ambit-cni"}]}"#;
        assert_eq!(without(only).unwrap(), r#"{"plugins": []}"#);
        assert!(matches!(with(only, &entry()), Err(ConflistError::Empty)));
    }

    #[test]
    fn one_plugin_of_its_own_becomes_a_list_if_its_version_knows_chains() {
        let single = "{\"cniVersion\": \"0.4.0\", \"name\": \"net\", \"type\": \"bridge\"}\n";
        let list = of_single(single).unwrap();
        let value: serde_json::Value = serde_json::from_str(&list).unwrap();
        assert_eq!(value["name"], "net");
        assert_eq!(value["cniVersion"], "0.4.0");
        assert_eq!(kinds(&list).unwrap(), ["bridge"]);
        for old in ["{\"type\": \"bridge\"}", "{\"cniVersion\": \"0.2.0\"}"] {
            assert!(matches!(of_single(old), Err(ConflistError::Version(_))));
        }
        assert!(of_single("x").is_err());
        assert!(kinds(single).is_err());
    }
}
