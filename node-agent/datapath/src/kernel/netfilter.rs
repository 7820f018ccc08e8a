//! The netfilter side of netlink (nfnetlink): what sets hold, and whether the rules of nftables have
//! changed. Reading is all; libipset and iptables write.

use std::io;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use rtnetlink::packet_core::{
    DefaultNla, Emitable, NLA_HEADER_SIZE, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer,
    NlaBuffer, NlasIterator,
};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{Socket, SocketAddr};

use crate::netns::Netns;

/// Message types of uapi/linux/netfilter/ipset/ip_set.h and nf_tables.h, with their subsystem.
const IPSET_LIST: u16 = 6 << 8 | 7;
const NFT_GETGEN: u16 = 10 << 8 | 16;

/// Attributes of a set: the protocol's version, its name, its members.
const SET_PROTOCOL: u16 = 1;
const SET_NAME: u16 = 2;
const SET_MEMBERS: u16 = 8;
/// Attributes of a member: its data, therein its address, therein that of a family.
const MEMBER_DATA: u16 = 7;
const MEMBER_IP: u16 = 1;
/// The version that libipset 7 speaks.
const IPSET_PROTOCOL: u8 = 7;

/// The number of the generation of nftables' rules.
const GENERATION_ID: u16 = 1;

/// Length of a message's header, and of the one that nfnetlink puts behind it.
const HEADER: usize = 16;
const NETFILTER_HEADER: usize = 4;

/// The answer that acknowledges or refuses, and the one that ends a list.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// A netfilter socket in one namespace.
#[derive(Debug)]
pub(crate) struct Netfilter {
    /// One question at a time, with the number of the last one.
    socket: Mutex<(Socket, u32)>,
}

impl Netfilter {
    pub(crate) fn open(netns: &Netns) -> io::Result<Self> {
        let socket = netns.run(|| -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_NETFILTER)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        })??;
        Ok(Self {
            socket: Mutex::new((socket, 0)),
        })
    }

    /// The members of a set of addresses; none if there is no such set.
    pub(crate) fn members(&self, set: &str) -> io::Result<Option<Vec<IpAddr>>> {
        let name = [set.as_bytes(), b"\0"].concat();
        let attributes = [
            DefaultNla::new(SET_PROTOCOL, vec![IPSET_PROTOCOL]),
            DefaultNla::new(SET_NAME, name),
        ];
        let mut members = Vec::new();
        let asked = self.ask(IPSET_LIST, NLM_F_ACK | NLM_F_DUMP, &attributes, |answer| {
            members.extend(self::members(answer));
        });
        match asked {
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(None),
            other => other.map(|()| Some(members)),
        }
    }

    /// The generation of nftables' rules: another number after every change of any of them.
    pub(crate) fn generation(&self) -> io::Result<Option<u32>> {
        let mut generation = None;
        self.ask(NFT_GETGEN, NLM_F_ACK, &[], |answer| {
            let value = within(answer, GENERATION_ID).next();
            generation = value
                .and_then(|value| value.try_into().ok())
                .map(u32::from_be_bytes);
        })?;
        Ok(generation)
    }

    /// Sends a question, and hands the attributes of every answer over.
    fn ask(
        &self,
        kind: u16,
        flags: u16,
        attributes: &[DefaultNla],
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let mut guard = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let (socket, number) = &mut *guard;
        *number = number.wrapping_add(1);
        socket.send(&question(kind, flags, *number, attributes), 0)?;
        loop {
            let (datagram, _) = socket.recv_from_full()?;
            if let Some(done) = answers(&datagram, *number, &mut each)? {
                return done;
            }
        }
    }
}

/// Hands the attributes of what answers the question of this number over; its outcome, once that has come.
pub(super) fn answers(
    datagram: &[u8],
    number: u32,
    each: &mut impl FnMut(&[u8]),
) -> io::Result<Option<io::Result<()>>> {
    let mut rest = datagram;
    while !rest.is_empty() {
        let message = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
        let length = (message.length() as usize).next_multiple_of(4);
        rest = rest.get(length..).unwrap_or_default();
        // What is left of an earlier question that failed.
        if message.sequence_number() != number {
            continue;
        }
        let payload = message.payload();
        match message.message_type() {
            NLMSG_ERROR | NLMSG_DONE => return Ok(Some(outcome(payload))),
            _ => each(payload.get(NETFILTER_HEADER..).unwrap_or_default()),
        }
    }
    Ok(None)
}

/// The members that an answer about a set names.
pub(super) fn members(answer: &[u8]) -> impl Iterator<Item = IpAddr> {
    let lists = within(answer, SET_MEMBERS);
    let data = lists.flat_map(|list| within(list, MEMBER_DATA));
    data.flat_map(|data| within(data, MEMBER_IP)).filter_map(ip)
}

fn question(kind: u16, flags: u16, number: u32, attributes: &[DefaultNla]) -> Vec<u8> {
    let length = HEADER + NETFILTER_HEADER + attributes.buffer_len();
    let mut bytes = vec![0; length];
    let mut message = NetlinkBuffer::new(&mut bytes);
    message.set_length(u32::try_from(length).unwrap_or_default());
    message.set_message_type(kind);
    message.set_flags(NLM_F_REQUEST | flags);
    message.set_sequence_number(number);
    attributes.emit(&mut bytes[HEADER + NETFILTER_HEADER..]);
    bytes
}

/// The error, if it is not 0, that an acknowledgement or the end of a list starts with.
fn outcome(payload: &[u8]) -> io::Result<()> {
    let code = payload
        .first_chunk()
        .map_or(0, |code| i32::from_ne_bytes(*code));
    match code {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
    }
}

/// The values of the attributes of one kind.
fn within(attributes: &[u8], kind: u16) -> impl Iterator<Item = &[u8]> {
    NlasIterator::new(attributes)
        .filter_map(Result::ok)
        .filter(move |attribute: &NlaBuffer<&[u8]>| attribute.kind() == kind)
        .filter_map(|attribute| {
            let length = usize::from(attribute.length());
            attribute.into_inner().get(NLA_HEADER_SIZE..length)
        })
}

/// The address in an attribute that holds one of either family.
fn ip(address: &[u8]) -> Option<IpAddr> {
    let attribute = NlasIterator::new(address).find_map(Result::ok)?;
    let value = attribute.value();
    match value.len() {
        4 => Some(IpAddr::from(*value.first_chunk::<4>()?)),
        16 => Some(IpAddr::from(*value.first_chunk::<16>()?)),
        _ => None,
    }
}
