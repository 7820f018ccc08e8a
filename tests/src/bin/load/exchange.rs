//! What client and server say to each other.

use clap::ValueEnum;

/// Kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Work {
    /// The client sends as fast as it can.
    Bulk,
    /// A message there and back, again and again, on open connections.
    PingPong,
    /// A new connection for each message there and back.
    Connect,
    /// Connections that stay open and say nothing.
    Idle,
}

/// First byte of a connection on which the server only reads, until the client closes.
pub(crate) const SINK: u8 = b'S';

/// First byte of a connection on which the server sends each message back.
pub(crate) const ECHO: u8 = b'E';

/// First byte of a connection on which the server sends one message back and closes: the side that
/// closes first keeps the connection in TIME-WAIT (RFC 9293), and the client's ports are few.
pub(crate) const ONCE: u8 = b'O';

/// Size of a message that is sent back, in bytes.
pub(crate) const MESSAGE: usize = 64;

/// Size of one write of bulk traffic, in bytes.
pub(crate) const BULK_WRITE: usize = 64 * 1024;
