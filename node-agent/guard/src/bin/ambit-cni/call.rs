//! What the container runtime asks for: environment and standard input, checked. Pure.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Value, json};

/// The newest version of the specification that is spoken.
pub(crate) const NEWEST: &str = "1.1.0";

/// All versions that are spoken: those that know chains.
pub(crate) const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// One call.
#[derive(Debug)]
pub(crate) struct Call {
    /// Version that the answer is to be in.
    pub(crate) version: String,
    /// File of the agent's orders.
    pub(crate) orders: PathBuf,
    /// Namespaces whose pods are never held.
    pub(crate) unheld: Vec<String>,
    pub(crate) command: Command,
}

#[derive(Debug)]
pub(crate) enum Command {
    Add(Box<Addition>),
    Delete(Attachment),
    /// Of all attachments of a network, these are left.
    Collect {
        network: String,
        valid: Vec<Attachment>,
    },
    Version,
    /// CHECK and STATUS: there is nothing that could be wrong. A hold may have been lifted by now, and
    /// nothing is needed to hold a pod but the kernel.
    Nothing,
}

/// A device of a container.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Attachment {
    #[serde(rename = "containerID")]
    pub(crate) container: String,
    #[serde(rename = "ifname")]
    pub(crate) interface: String,
}

/// A device that was just added.
#[derive(Debug)]
pub(crate) struct Addition {
    pub(crate) attachment: Attachment,
    pub(crate) network: String,
    /// File of the container's network namespace.
    pub(crate) netns: String,
    /// None if it is no pod of Kubernetes.
    pub(crate) pod: Option<Pod>,
    /// What the plugin before said, to be handed on.
    pub(crate) result: Value,
    pub(crate) addresses: Vec<IpAddr>,
}

#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Old runtimes do not tell it.
    pub(crate) uid: Option<String>,
}

/// A call that is not as the specification has it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    #[error("read the configuration from standard input")]
    Input(#[source] io::Error),
    #[error("the configuration on standard input is no CNI configuration")]
    Parse(#[source] serde_json::Error),
    #[error("the environment lacks {0}")]
    Environment(&'static str),
    #[error("CNI_COMMAND {0:?} is none of the specification")]
    Command(String),
    #[error("the cniVersion {0:?} is none of {VERSIONS:?}")]
    Version(String),
    #[error(
        "there is no prevResult: this plugin makes no device, it stands after one that does in a chain"
    )]
    NoResult,
    #[error("the prevResult has an address {0:?}")]
    Address(String),
}

#[derive(Deserialize)]
struct Configuration {
    #[serde(rename = "cniVersion")]
    version: Option<String>,
    #[serde(default)]
    name: String,
    orders: Option<PathBuf>,
    #[serde(default)]
    unheld: Vec<String>,
    #[serde(rename = "prevResult")]
    result: Option<Value>,
    #[serde(rename = "cni.dev/valid-attachments", default)]
    valid: Vec<Attachment>,
}

#[derive(Deserialize)]
struct Ips {
    #[serde(default)]
    ips: Vec<Ip>,
}

#[derive(Deserialize)]
struct Ip {
    address: String,
}

impl Call {
    /// Reads a call.
    pub(crate) fn parse(
        input: &[u8],
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, CallError> {
        let needed = |name| variable(name).ok_or(CallError::Environment(name));
        let command = needed("CNI_COMMAND")?;
        let configuration: Configuration =
            serde_json::from_slice(input).map_err(CallError::Parse)?;
        let version = configuration.version.unwrap_or_else(|| NEWEST.to_owned());
        // Whatever the version, it can be asked which are spoken.
        if command != "VERSION" && !VERSIONS.contains(&version.as_str()) {
            return Err(CallError::Version(version));
        }
        let attachment = || -> Result<Attachment, CallError> {
            Ok(Attachment {
                container: needed("CNI_CONTAINERID")?,
                interface: needed("CNI_IFNAME")?,
            })
        };
        let command = match command.as_str() {
            "ADD" => {
                let result = configuration.result.ok_or(CallError::NoResult)?;
                Command::Add(Box::new(Addition {
                    attachment: attachment()?,
                    network: configuration.name,
                    netns: needed("CNI_NETNS")?,
                    pod: pod(&variable("CNI_ARGS").unwrap_or_default()),
                    addresses: addresses(&result)?,
                    result: versioned(result, &version),
                }))
            }
            "DEL" => Command::Delete(attachment()?),
            "GC" => Command::Collect {
                network: configuration.name,
                valid: configuration.valid,
            },
            "VERSION" => Command::Version,
            "CHECK" | "STATUS" => Command::Nothing,
            other => return Err(CallError::Command(other.to_owned())),
        };
        Ok(Self {
            version,
            orders: configuration.orders.unwrap_or_else(|| guard::ORDERS.into()),
            unheld: configuration.unheld,
            command,
        })
    }
}

/// The result is handed on as it came; only its version is made sure of.
fn versioned(mut result: Value, version: &str) -> Value {
    if let Value::Object(fields) = &mut result {
        fields.entry("cniVersion").or_insert_with(|| json!(version));
    }
    result
}

fn addresses(result: &Value) -> Result<Vec<IpAddr>, CallError> {
    let Ips { ips } = Ips::deserialize(result).map_err(CallError::Parse)?;
    ips.into_iter()
        .map(|ip| {
            let parsed: Result<IpNet, _> = ip.address.parse();
            parsed
                .map(|net| net.addr())
                .map_err(|_| CallError::Address(ip.address))
        })
        .collect()
}

/// The pod that `KEY=VALUE;KEY=VALUE` speaks of.
fn pod(arguments: &str) -> Option<Pod> {
    let value = |wanted: &str| {
        let pairs = arguments.split(';').filter_map(|pair| pair.split_once('='));
        pairs
            .filter(|(key, value)| *key == wanted && !value.is_empty())
            .map(|(_, value)| value.to_owned())
            .next()
    };
    Some(Pod {
        namespace: value("K8S_POD_NAMESPACE")?,
        name: value("K8S_POD_NAME")?,
        uid: value("K8S_POD_UID"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARGUMENTS: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=u-1";

    fn parse(command: &str, input: &str) -> Result<Call, CallError> {
        Call::parse(input.as_bytes(), |name| {
            Some(
                match name {
                    "CNI_COMMAND" => command,
                    "CNI_CONTAINERID" => "c",
                    "CNI_IFNAME" => "eth0",
                    "CNI_NETNS" => "/run/netns/x",
                    "CNI_ARGS" => ARGUMENTS,
                    _ => return None,
                }
                .to_owned(),
            )
        })
    }

    fn add(input: &str) -> Result<Addition, CallError> {
        match parse("ADD", input)?.command {
            Command::Add(addition) => Ok(*addition),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn results_of_every_version_are_handed_on_as_they_came() {
        for (version, address) in [
            (
                "0.3.1",
                r#"{"version":"4","address":"10.0.0.4/24","gateway":"10.0.0.1","interface":1}"#,
            ),
            ("0.4.0", r#"{"version":"4","address":"10.0.0.4/32"}"#),
            ("1.1.0", r#"{"address":"10.0.0.4/24","interface":1}"#),
        ] {
            let result = format!(
                r#"{{"cniVersion":"{version}","interfaces":[{{"name":"veth1"}},{{"name":"eth0","sandbox":"/x"}}],"ips":[{address},{{"address":"fd00::4/64"}}],"dns":{{}},"unknown":[1]}}"#
            );
            let input = format!(
                r#"{{"cniVersion":"{version}","name":"n","type":"ambit-cni","prevResult":{result}}}"#
            );
            let addition = add(&input).unwrap();
            assert_eq!(
                addition.result,
                serde_json::from_str::<Value>(&result).unwrap()
            );
            assert_eq!(addition.addresses.len(), 2);
            assert_eq!(addition.addresses[0].to_string(), "10.0.0.4");
            let pod = addition.pod.unwrap();
            assert_eq!(
                (&*pod.namespace, &*pod.name, pod.uid.as_deref()),
                ("shop", "web", Some("u-1"))
            );
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        assert!(matches!(
            add(r#"{"cniVersion":"1.0.0","name":"n"}"#),
            Err(CallError::NoResult)
        ));
        assert!(matches!(
            add(r#"{"cniVersion":"0.2.0","prevResult":{}}"#),
            Err(CallError::Version(_))
        ));
        assert!(matches!(add("{"), Err(CallError::Parse(_))));
        assert!(matches!(
            add(r#"{"cniVersion":"1.0.0","prevResult":{"ips":[{"address":"x"}]}}"#),
            Err(CallError::Address(_))
        ));
        assert!(matches!(
            parse("MOVE", r#"{"cniVersion":"1.0.0"}"#),
            Err(CallError::Command(_))
        ));
        let bare = Call::parse(b"{}", |_| None);
        assert!(matches!(bare, Err(CallError::Environment("CNI_COMMAND"))));
    }

    #[test]
    fn a_container_that_is_no_pod_is_none() {
        assert!(pod("").is_none());
        assert!(pod("K8S_POD_NAMESPACE=;K8S_POD_NAME=web").is_none());
        assert!(
            pod("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web").is_some_and(|pod| pod.uid.is_none())
        );
    }

    #[test]
    fn the_attachments_that_are_left_are_read() {
        let input = r#"{"cniVersion":"1.1.0","name":"n","cni.dev/valid-attachments":[{"containerID":"c","ifname":"eth0"}]}"#;
        let Command::Collect { network, valid } = parse("GC", input).unwrap().command else {
            panic!("no GC");
        };
        assert_eq!((network.as_str(), valid.len()), ("n", 1));
        assert_eq!(valid[0].container, "c");
    }
}
