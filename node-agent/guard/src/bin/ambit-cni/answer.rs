//! What the container runtime is told. Pure.

use std::error::Error;

use serde_json::{Value, json};

use crate::act::ActError;
use crate::call::{CallError, VERSIONS};

/// Codes of the specification.
const INCOMPATIBLE_VERSION: u32 = 1;
const INVALID_ENVIRONMENT: u32 = 4;
const INPUT_FAILED: u32 = 5;
const DECODE_FAILED: u32 = 6;
const INVALID_CONFIGURATION: u32 = 7;
const TRY_AGAIN_LATER: u32 = 11;
/// The first that plugins may give a meaning of their own.
const NOT_HELD: u32 = 100;

/// The versions that are spoken.
pub(crate) fn versions(asked: &str) -> Value {
    json!({"cniVersion": asked, "supportedVersions": VERSIONS})
}

/// A failure: kubelet shows it as an event of the pod.
pub(crate) fn failure(version: &str, error: &ActError) -> String {
    let code = match error {
        ActError::Call(CallError::Version(_)) => INCOMPATIBLE_VERSION,
        ActError::Call(CallError::Environment(_) | CallError::Command(_)) => INVALID_ENVIRONMENT,
        ActError::Call(CallError::Input(_)) => INPUT_FAILED,
        ActError::Call(CallError::Parse(_)) => DECODE_FAILED,
        ActError::Call(CallError::NoResult | CallError::Address(_)) => INVALID_CONFIGURATION,
        ActError::Orders(_) => TRY_AGAIN_LATER,
        ActError::NoUid { .. } | ActError::Device(_) | ActError::Rules(_) | ActError::Record(_) => {
            NOT_HELD
        }
    };
    let mut details = Vec::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        details.push(error.to_string());
        cause = error.source();
    }
    json!({
        "cniVersion": version,
        "code": code,
        "msg": format!("{}: {error}", guard::PROGRAM),
        "details": details.join(": "),
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_carries_its_causes() {
        let cause = serde_json::from_str::<Value>("{").unwrap_err();
        let text = failure("0.4.0", &ActError::Call(CallError::Parse(cause)));
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["cniVersion"], "0.4.0");
        assert_eq!(value["code"], DECODE_FAILED);
        assert!(value["details"].as_str().unwrap().contains("EOF"));
    }
}
