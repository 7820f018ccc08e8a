//! An agent that does what a test says.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use prost::Message;
use protocol::node::agent_message::Message as FromAgent;
use protocol::node::proxy_message::Message as FromProxy;
use protocol::node::{
    AgentMessage, Configure, Duty, Hello, Listener, ListenerKind, ProxyMessage, Report, Workload,
};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use crate::program::Program;

pub(crate) struct Agent {
    listener: UnixListener,
    messages: Option<Framed<UnixStream, LengthDelimitedCodec>>,
}

impl Agent {
    pub(crate) async fn start(program: &Program) -> Self {
        let path = program.folder().join("agent.sock");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(path).unwrap();
        Self {
            listener,
            messages: None,
        }
    }

    /// Waits for the proxy; checks the namespace that it hands over.
    #[allow(
        unsafe_code,
        reason = "a descriptor that comes with a message has no owner yet"
    )]
    pub(crate) async fn hello(&mut self) -> Hello {
        let (stream, _) = self.listener.accept().await.unwrap();
        let mut bytes = [0; 1024];
        let mut space = cmsg_space!([std::os::fd::RawFd; 1]);
        let receive = || {
            let mut data = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::empty();
            let got = recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut data, Some(&mut space), flags)?;
            let rights = got.cmsgs()?.next().expect("a descriptor");
            let ControlMessageOwned::ScmRights(descriptors) = rights else {
                panic!("no descriptor: {rights:?}");
            };
            Ok((got.bytes, descriptors[0]))
        };
        let (length, descriptor) = stream.async_io(Interest::READABLE, receive).await.unwrap();
        // SAFETY: the kernel has just made this descriptor for us.
        let namespace = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(descriptor) });
        let own = std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
        assert_eq!(
            namespace.metadata().unwrap().ino(),
            own,
            "the proxy is in our namespace"
        );
        let message = ProxyMessage::decode(&bytes[4..length]).unwrap();
        self.messages = Some(Framed::new(stream, LengthDelimitedCodec::new()));
        match message.message {
            Some(FromProxy::Hello(hello)) => hello,
            other => panic!("no hello: {other:?}"),
        }
    }

    /// Wants the usual listeners, and these workloads: UID, service account, addresses. The node's new
    /// connections come to the proxy.
    pub(crate) async fn configure(&mut self, generation: u64, workloads: &[(&str, &str, &str)]) {
        self.configure_for(Duty::Active, generation, workloads)
            .await;
    }

    /// The same with the duty that the proxy is to have.
    pub(crate) async fn configure_for(
        &mut self,
        duty: Duty,
        generation: u64,
        workloads: &[(&str, &str, &str)],
    ) {
        let listeners = [
            (ListenerKind::Outbound, 15001),
            (ListenerKind::Inbound, 15008),
            (ListenerKind::InboundPlaintext, 15006),
        ];
        let configure = Configure {
            generation,
            listeners: listeners
                .map(|(kind, port)| Listener {
                    kind: kind.into(),
                    port,
                })
                .to_vec(),
            workloads: workloads
                .iter()
                .map(|(uid, account, ips)| Workload {
                    uid: (*uid).to_owned(),
                    namespace: "shop".to_owned(),
                    name: (*uid).to_owned(),
                    service_account: (*account).to_owned(),
                    ips: ips.split(',').map(str::to_owned).collect(),
                })
                .collect(),
            duty: duty.into(),
            ..Configure::default()
        };
        let message = AgentMessage {
            message: Some(FromAgent::Configure(configure)),
        };
        let bytes = Bytes::from(message.encode_to_vec());
        self.messages.as_mut().unwrap().send(bytes).await.unwrap();
    }

    pub(crate) async fn report(&mut self) -> Report {
        let bytes = self.messages.as_mut().unwrap().next().await;
        let message = ProxyMessage::decode(bytes.expect("the proxy is there").unwrap()).unwrap();
        match message.message {
            Some(FromProxy::Report(report)) => report,
            other => panic!("no report: {other:?}"),
        }
    }

    /// Waits for such a report.
    pub(crate) async fn report_where(&mut self, wanted: impl Fn(&Report) -> bool) -> Report {
        loop {
            let report = self.report().await;
            if wanted(&report) {
                return report;
            }
        }
    }

    pub(crate) fn stop(self) {}
}
