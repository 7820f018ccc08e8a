//! One question, one answer, by rtnetlink(7), without a runtime: a plugin lives for a few milliseconds.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::rule::RuleMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;

/// A socket in the network namespace of the thread that opened it.
pub(crate) struct Netlink(Socket);

/// A question that got no good answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetlinkError {
    #[error("open a netlink socket")]
    Open(#[source] io::Error),
    #[error("{0}")]
    Refused(String, #[source] io::Error),
    #[error("{0}: the kernel's answer cannot be read")]
    Answer(String),
}

impl Netlink {
    pub(crate) fn open() -> Result<Self, NetlinkError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        };
        open().map(Self).map_err(NetlinkError::Open)
    }

    /// The device of this name.
    pub(crate) fn link(&self, name: &str) -> Result<LinkMessage, NetlinkError> {
        let mut message = LinkMessage::default();
        message
            .attributes
            .push(LinkAttribute::IfName(name.to_owned()));
        self.get(message, format!("read the device {name}"))
    }

    /// The device of this index.
    pub(crate) fn link_at(&self, index: u32) -> Result<LinkMessage, NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.get(message, format!("read the device of index {index}"))
    }

    /// Makes a rule, unless it is there.
    pub(crate) fn add_rule(&self, rule: RuleMessage, what: &str) -> Result<(), NetlinkError> {
        let flags = NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK;
        self.change(
            RouteNetlinkMessage::NewRule(rule),
            flags,
            Errno::EEXIST,
            what,
        )
    }

    /// Removes a rule, if it is there.
    pub(crate) fn remove_rule(&self, rule: RuleMessage, what: &str) -> Result<(), NetlinkError> {
        self.change(
            RouteNetlinkMessage::DelRule(rule),
            NLM_F_ACK,
            Errno::ENOENT,
            what,
        )
    }

    fn get(&self, message: LinkMessage, what: String) -> Result<LinkMessage, NetlinkError> {
        match self.ask(RouteNetlinkMessage::GetLink(message), 0) {
            Ok(Some(RouteNetlinkMessage::NewLink(link))) => Ok(link),
            Ok(_) => Err(NetlinkError::Answer(what)),
            Err(error) => Err(NetlinkError::Refused(what, error)),
        }
    }

    /// `done` is the refusal that says that nothing is to be done.
    fn change(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        done: Errno,
        what: &str,
    ) -> Result<(), NetlinkError> {
        match self.ask(message, flags) {
            Err(error) if error.raw_os_error() == Some(done as i32) => Ok(()),
            Err(error) => Err(NetlinkError::Refused(what.to_owned(), error)),
            Ok(_) => Ok(()),
        }
    }

    /// The kernel's answer; none if it only agrees.
    fn ask(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Option<RouteNetlinkMessage>> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        let (bytes, _) = self.0.recv_from_full()?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes)
            .map_err(|error| io::Error::other(error.to_string()))?;
        match answer.payload {
            NetlinkPayload::InnerMessage(answer) => Ok(Some(answer)),
            NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
            _ => Ok(None),
        }
    }
}
