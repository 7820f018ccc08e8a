//! The two others that the agent talks to: a proxy that says what a test wants, and an API server that
//! knows the proxies' pods.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use datapath::netns::Netns;
use futures::{SinkExt, StreamExt};
use kube::{Client, Config};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use prost::Message;
use protocol::node::{
    AgentMessage, Configure, Duty, Hello, ProxyMessage, Report, WorkloadReport, WorkloadState,
    agent_message, proxy_message,
};
use serde_json::json;
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use super::bed::{Bed, NEXT_PROXY, PROXY};
use crate::roster::tests::bound;

type Look = Box<dyn Fn() + Send>;

/// A proxy that is connected; it is gone when dropped.
pub(super) struct Peer {
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    known: BTreeSet<String>,
    held_back: BTreeSet<String>,
    looks: BTreeMap<String, Look>,
    forgot_cleanly: BTreeSet<String>,
    ending: bool,
    duty: Duty,
}

impl Peer {
    /// Connects as the proxy whose pod is the namespace of that name.
    pub(super) async fn connect(socket: &Path, bed: &Bed, name: &str) -> Self {
        Self::connect_as(socket, &bed.netns(name), name).await
    }

    /// Connects with any namespace and any name.
    pub(super) async fn connect_as(socket: &Path, netns: &Netns, name: &str) -> Self {
        let stream = UnixStream::connect(socket).await.unwrap();
        say_hello(&stream, netns, name);
        let shared = Arc::new(Shared::default());
        let task = tokio::spawn(serve(stream, shared.clone()));
        Self { shared, task }
    }

    pub(super) fn hold_back(&self, uid: &str) {
        self.shared
            .state
            .lock()
            .unwrap()
            .held_back
            .insert(uid.to_owned());
    }

    pub(super) fn release(&self, uid: &str) {
        self.shared.state.lock().unwrap().held_back.remove(uid);
        self.shared.changed.notify_one();
    }

    /// From now on it says that it was told to end.
    pub(super) fn end(&self) {
        self.shared.state.lock().unwrap().ending = true;
        self.shared.changed.notify_one();
    }

    /// What it was told last about the node's new connections.
    pub(super) fn duty(&self) -> Duty {
        self.shared.state.lock().unwrap().duty
    }

    pub(super) fn knows(&self, uid: &str) -> bool {
        self.shared.state.lock().unwrap().known.contains(uid)
    }

    /// When it is told to forget the workload, it looks; a look that panics was not clean.
    pub(super) fn on_forget(&self, uid: &str, look: impl Fn() + Send + 'static) {
        self.shared
            .state
            .lock()
            .unwrap()
            .looks
            .insert(uid.to_owned(), Box::new(look));
    }

    pub(super) fn forgot_cleanly(&self, uid: &str) -> bool {
        self.shared
            .state
            .lock()
            .unwrap()
            .forgot_cleanly
            .contains(uid)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn say_hello(stream: &UnixStream, netns: &Netns, name: &str) {
    let hello = Hello {
        version: "test".to_owned(),
        pod_uid: format!("uid-{name}"),
        pod_name: name.to_owned(),
    };
    let message = ProxyMessage {
        message: Some(proxy_message::Message::Hello(hello)),
    }
    .encode_to_vec();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let descriptor = [netns.descriptor().unwrap().as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&descriptor)];
    let slices = [IoSlice::new(&length), IoSlice::new(&message)];
    sendmsg::<()>(
        stream.as_raw_fd(),
        &slices,
        &rights,
        MsgFlags::empty(),
        None,
    )
    .unwrap();
}

async fn serve(stream: UnixStream, shared: Arc<Shared>) {
    let mut frames = Framed::new(stream, LengthDelimitedCodec::new());
    let mut told = Configure::default();
    loop {
        tokio::select! {
            message = frames.next() => {
                let Some(Ok(bytes)) = message else { return };
                let Some(agent_message::Message::Configure(configure)) = AgentMessage::decode(bytes).unwrap().message else {
                    continue;
                };
                told = configure;
            }
            () = shared.changed.notified() => {}
        }
        let report = shared.answer(&told);
        let message = ProxyMessage {
            message: Some(proxy_message::Message::Report(report)),
        };
        if frames
            .send(bytes::Bytes::from(message.encode_to_vec()))
            .await
            .is_err()
        {
            return;
        }
    }
}

impl Shared {
    fn answer(&self, told: &Configure) -> Report {
        let mut state = self.state.lock().unwrap();
        state.duty = told.duty();
        let known: BTreeSet<String> = told
            .workloads
            .iter()
            .map(|workload| workload.uid.clone())
            .collect();
        let forgotten: Vec<String> = state.known.difference(&known).cloned().collect();
        for uid in forgotten {
            let Some(look) = state.looks.remove(&uid) else {
                continue;
            };
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(look)).is_ok() {
                state.forgot_cleanly.insert(uid);
            }
        }
        let workload = |uid: &String| WorkloadReport {
            uid: uid.clone(),
            state: if state.held_back.contains(uid) {
                WorkloadState::Pending.into()
            } else {
                WorkloadState::Ready.into()
            },
            message: String::new(),
        };
        let report = Report {
            generation: told.generation,
            listeners: bound(told),
            workloads: known.iter().map(workload).collect(),
            ending: state.ending,
        };
        state.known = known;
        report
    }
}

/// An API server that knows the proxies' pods and nothing else.
pub(super) async fn api_server() -> Client {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let route = "/api/v1/namespaces/ambit-system/pods/{name}";
    let routes = axum::Router::new().route(route, axum::routing::get(pod));
    tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() });
    let url = format!("http://{address}").parse().unwrap();
    Client::try_from(Config::new(url)).unwrap()
}

async fn pod(axum::extract::Path(name): axum::extract::Path<String>) -> Response {
    let ip = match name.as_str() {
        "proxy" => PROXY,
        "next" => NEXT_PROXY,
        "hidden" => {
            let status = json!({"kind": "Status", "status": "Failure", "reason": "Forbidden", "code": 403, "message": "pods is forbidden"});
            return answer(StatusCode::FORBIDDEN, &status);
        }
        _ => {
            let status =
                json!({"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404});
            return answer(StatusCode::NOT_FOUND, &status);
        }
    };
    let pod = json!({
        "metadata": {
            "name": name, "namespace": "ambit-system", "uid": format!("uid-{name}"),
            "creationTimestamp": if ip == NEXT_PROXY { "2026-01-02T00:00:00Z" } else { "2026-01-01T00:00:00Z" },
        },
        "spec": {"nodeName": "node-1", "serviceAccountName": "ambit-proxy", "containers": []},
        "status": {"podIPs": [{"ip": ip}]},
    });
    answer(StatusCode::OK, &pod)
}

fn answer(code: StatusCode, body: &serde_json::Value) -> Response {
    (
        code,
        [(header::CONTENT_TYPE, "application/json")],
        body.to_string(),
    )
        .into_response()
}
