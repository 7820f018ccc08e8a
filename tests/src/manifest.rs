//! The objects that tests deploy: small namespaces of servers and clients.

/// Image of the test program; `tests/cluster` builds it.
pub const PODTOOL: &str = "docker.io/ambit/podtool:dev";

/// Port of podtool's TCP server, which greets and then sends back what it gets.
pub const TCP: u16 = 9000;
/// Port of podtool's HTTP/1.1 and h2c server.
pub const HTTP: u16 = 8080;

/// A namespace, labelled for the mesh or not.
#[must_use]
pub fn namespace(name: &str, mode: Option<&str>) -> String {
    let labels = mode.map_or_else(
        || "{kubernetes.io/metadata.name: NAME}".replace("NAME", name),
        |mode| format!("{{istio.io/dataplane-mode: {mode}}}"),
    );
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {labels}}}\n---\n")
}

/// A pod of podtool and a service account of its name.
#[derive(Clone, Debug)]
pub struct Pod<'a> {
    /// Namespace of the pod.
    pub namespace: &'a str,
    /// Name of the pod and of its service account.
    pub name: &'a str,
    /// Value of its `app` label, if it is not its name.
    pub app: Option<&'a str>,
    /// Node it runs on.
    pub node: &'a str,
    /// Value of the pod's own `istio.io/dataplane-mode` label.
    pub mode: Option<&'a str>,
    /// Whether it uses the node's network namespace.
    pub host_network: bool,
    /// First of its ports, if they are not the usual ones: on the node's network they are the node's.
    pub ports_from: Option<u16>,
    /// Command of the container instead of podtool's servers, as YAML in flow style.
    pub command: Option<&'a str>,
    /// Kubelet's probe of the container, as YAML in flow style.
    pub probe: Option<&'a str>,
}

impl<'a> Pod<'a> {
    /// A pod with nothing special.
    #[must_use]
    pub fn new(namespace: &'a str, name: &'a str, node: &'a str) -> Self {
        Self {
            namespace,
            name,
            app: None,
            node,
            mode: None,
            host_network: false,
            ports_from: None,
            command: None,
            probe: None,
        }
    }

    /// Its manifests.
    #[must_use]
    pub fn manifests(&self) -> String {
        let Self {
            namespace,
            name,
            node,
            host_network,
            ..
        } = self;
        let app = self.app.unwrap_or(name);
        let mode = self.mode.map_or_else(String::new, |mode| {
            format!(", istio.io/dataplane-mode: {mode}")
        });
        let probes = self.probe.map_or_else(String::new, |probe| {
            format!(", readinessProbe: {probe}, livenessProbe: {probe}")
        });
        let serve = self.ports_from.map_or_else(
            || "[serve]".to_owned(),
            |first| {
                let [tcp, after_end, http] = [first, first + 1, first + 2];
                format!(
                    "[serve, --tcp, '{tcp}', --udp, '{tcp}', --after-end, '{after_end}', --http, '{http}']"
                )
            },
        );
        let run = self.command.map_or_else(
            || format!("args: {serve}"),
            |command| format!("command: {command}"),
        );
        format!(
            "apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}, namespace: {namespace}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {app}{mode}}}}}
spec:
  nodeName: {node}
  serviceAccountName: {name}
  hostNetwork: {host_network}
  terminationGracePeriodSeconds: 0
  containers:
  - {{name: podtool, image: '{PODTOOL}', imagePullPolicy: Never, {run}{probes}}}
---
"
        )
    }
}

/// A Service of both families over the pods whose `app` label has this value; headless if it has no address.
#[must_use]
pub fn service(namespace: &str, name: &str, app: &str, headless: bool) -> String {
    let cluster_ip = if headless { "clusterIP: None, " } else { "" };
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  {{{cluster_ip}ipFamilyPolicy: PreferDualStack, selector: {{app: {app}}},
    ports: [{{name: tcp, port: {TCP}}}, {{name: http, port: 80, targetPort: {HTTP}}}]}}
---
"
    )
}

/// A Service of one port, of both families.
#[must_use]
pub fn service_port(namespace: &str, name: &str, app: &str, port: u16) -> String {
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec: {{ipFamilyPolicy: PreferDualStack, selector: {{app: {app}}}, ports: [{{port: {port}}}]}}
---
"
    )
}
