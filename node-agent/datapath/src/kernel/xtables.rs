//! Whether the rules of iptables-legacy have changed: the kernel has no number for that, as it has for nftables', but
//! hands out its tables in one piece, far faster than a program prints them.
//!
//! uapi/linux/netfilter_ipv4/ip_tables.h and uapi/linux/netfilter_ipv6/ip6_tables.h.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::datapath::Table;
use crate::family::Family;
use crate::netns::Netns;

/// IPT_SO_GET_INFO and IPT_SO_GET_ENTRIES; those of IPv6 are the same numbers.
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;

/// A table may be changed between the question for its size and that for its rules.
const TRIES: usize = 5;

/// `struct ipt_getinfo`.
#[repr(C)]
struct Info {
    name: [u8; 32],
    valid_hooks: u32,
    hook_entry: [u32; 5],
    underflow: [u32; 5],
    num_entries: u32,
    size: u32,
}

/// `struct ipt_get_entries`; rules are aligned to the counters in them.
#[repr(C)]
struct Entries {
    name: [u8; 32],
    size: u32,
    table: [u64; 0],
}

/// Where in `struct ipt_entry`, or `struct ip6t_entry`, is what.
struct Layout {
    domain: AddressFamily,
    level: i32,
    /// `next_offset`: the length of the whole rule, 16 bits.
    length: usize,
    /// Packets and bytes, which are no part of the rule.
    counters: std::ops::Range<usize>,
    names: &'static str,
}

const IPV4: Layout = Layout {
    domain: AddressFamily::Inet,
    level: libc::IPPROTO_IP,
    length: 90,
    counters: 96..112,
    names: "/proc/thread-self/net/ip_tables_names",
};
const IPV6: Layout = Layout {
    domain: AddressFamily::Inet6,
    level: libc::IPPROTO_IPV6,
    length: 142,
    counters: 152..168,
    names: "/proc/thread-self/net/ip6_tables_names",
};

impl Layout {
    fn of(family: Family) -> &'static Self {
        match family {
            Family::V4 => &IPV4,
            Family::V6 => &IPV6,
        }
    }
}

/// A hash of the rules of each table that is there, by its name, or of one table.
///
/// # Errors
/// If the namespace cannot be entered, or the kernel does not hand its tables out.
pub(crate) fn hashes(
    netns: &Netns,
    family: Family,
    table: Option<Table>,
) -> io::Result<BTreeMap<String, u64>> {
    netns.run(|| {
        let layout = Layout::of(family);
        let mut tables = tables(layout)?;
        tables.retain(|name| table.is_none_or(|table| table.name() == name));
        // Without a table there need not be the module that answers.
        if tables.is_empty() {
            return Ok(BTreeMap::new());
        }
        let socket = socket(
            layout.domain,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        let hash = |name: String| {
            let rules = read(&socket, layout, &name)?;
            Ok((name, hash(&rules, layout)?))
        };
        tables.into_iter().map(hash).collect()
    })?
}

/// Whether somebody in this thread's namespace uses the legacy tables of the family; it makes none.
pub(crate) fn in_use(netns: &Netns, family: Family) -> io::Result<bool> {
    netns.run(|| tables(Layout::of(family)).map(|tables| !tables.is_empty()))?
}

/// The tables that are there. To ask for another one would make it.
fn tables(layout: &Layout) -> io::Result<Vec<String>> {
    match std::fs::read_to_string(layout.names) {
        Ok(names) => Ok(names.split_whitespace().map(str::to_owned).collect()),
        // A kernel without them.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The rules of a table, as the kernel lays them out.
fn read(socket: &OwnedFd, layout: &Layout, table: &str) -> io::Result<Vec<u8>> {
    let mut tries = 1..TRIES;
    loop {
        match try_read(socket, layout, table) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && tries.next().is_some() => {}
            result => return result,
        }
    }
}

fn try_read(socket: &OwnedFd, layout: &Layout, table: &str) -> io::Result<Vec<u8>> {
    let mut info = vec![0; size_of::<Info>()];
    put(&mut info, 0, table.as_bytes())?;
    ask(socket, layout.level, GET_INFO, &mut info)?;
    let size = u32_at(&info, offset_of!(Info, size))?;
    let start = offset_of!(Entries, table);
    let mut entries = vec![0; start + size as usize];
    put(&mut entries, 0, table.as_bytes())?;
    put(&mut entries, offset_of!(Entries, size), &size.to_ne_bytes())?;
    ask(socket, layout.level, GET_ENTRIES, &mut entries)?;
    entries.drain(..start);
    Ok(entries)
}

/// What [`hashes`] gives for the rules of a table.
#[cfg(fuzzing)]
pub(crate) fn hash_of(rules: &[u8], family: Family) -> io::Result<u64> {
    hash(rules, Layout::of(family))
}

/// That of rules without what they have counted.
fn hash(rules: &[u8], layout: &Layout) -> io::Result<u64> {
    let mut hasher = DefaultHasher::new();
    let mut rest = rules;
    while !rest.is_empty() {
        let length = rest
            .get(layout.length..)
            .and_then(|rest| rest.first_chunk())
            .map(|length| usize::from(u16::from_ne_bytes(*length)))
            .filter(|length| *length >= layout.counters.end && *length <= rest.len())
            .ok_or_else(malformed)?;
        let (rule, after) = rest.split_at(length);
        hasher.write(&rule[..layout.counters.start]);
        hasher.write(&rule[layout.counters.end..]);
        rest = after;
    }
    Ok(hasher.finish())
}

fn put(buffer: &mut [u8], at: usize, value: &[u8]) -> io::Result<()> {
    let place = buffer.get_mut(at..at + value.len()).ok_or_else(malformed)?;
    place.copy_from_slice(value);
    Ok(())
}

fn u32_at(buffer: &[u8], at: usize) -> io::Result<u32> {
    let value = buffer.get(at..).and_then(|rest| rest.first_chunk());
    value
        .map(|value| u32::from_ne_bytes(*value))
        .ok_or_else(malformed)
}

fn malformed() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the kernel's iptables rules are not laid out as expected",
    )
}

/// getsockopt with a question in the buffer, which nix does not have.
fn ask(socket: &OwnedFd, level: i32, option: i32, buffer: &mut [u8]) -> io::Result<()> {
    let mut length = libc::socklen_t::try_from(buffer.len()).map_err(|_| malformed())?;
    // SAFETY: the kernel reads and writes at most `length` bytes of the buffer, which are initialised, and `length`.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            buffer.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rule of IPv4 with this much behind its head, and counters of this value.
    fn rule(tail: &[u8], counted: u8) -> Vec<u8> {
        let mut rule = vec![0; 112];
        rule[96..112].fill(counted);
        rule.extend_from_slice(tail);
        let length = u16::try_from(rule.len()).unwrap();
        rule[90..92].copy_from_slice(&length.to_ne_bytes());
        rule
    }

    fn of(rules: &[Vec<u8>]) -> io::Result<u64> {
        hash(&rules.concat(), &IPV4)
    }

    #[test]
    fn what_rules_count_is_no_change_and_what_they_say_is() {
        let before = of(&[rule(b"ACCEPT", 0), rule(b"DROP", 0)]).unwrap();
        assert_eq!(before, of(&[rule(b"ACCEPT", 7), rule(b"DROP", 9)]).unwrap());
        for other in [
            vec![rule(b"ACCEPT", 0), rule(b"DROQ", 0)],
            vec![rule(b"DROP", 0), rule(b"ACCEPT", 0)],
            vec![rule(b"ACCEPT", 0)],
        ] {
            assert_ne!(before, of(&other).unwrap());
        }
    }

    #[test]
    fn rules_of_another_layout_are_an_error() {
        let mut long = rule(b"", 0);
        long[90..92].copy_from_slice(&200_u16.to_ne_bytes());
        let mut short = rule(b"", 0);
        short[90..92].copy_from_slice(&0_u16.to_ne_bytes());
        for wrong in [vec![1; 20], long, short] {
            assert!(of(&[wrong]).is_err());
        }
    }

    #[test]
    fn the_kernels_structures_have_their_size() {
        assert_eq!((size_of::<Info>(), offset_of!(Info, size)), (84, 80));
        assert_eq!(offset_of!(Entries, size), 32);
    }
}
