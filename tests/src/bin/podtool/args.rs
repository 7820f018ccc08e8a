//! The command line.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use http::Uri;

#[derive(Parser)]
pub(crate) struct Arguments {
    /// Seconds after which a client gives up; for one that lasts, seconds that each of its steps may take.
    #[arg(long, default_value_t = 10, global = true)]
    pub(crate) timeout: u64,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Runs every server until the process is killed.
    Serve(Ports),
    /// Runs clients until standard input ends: each line of it is the arguments of one, as a JSON array.
    Obey,
    /// Reads the greeting of a TCP server, sends it a line and reads it back.
    Send {
        /// Host and port.
        #[arg(long)]
        to: String,
        /// The line.
        #[arg(long, default_value = "ping")]
        text: String,
    },
    /// Sends a line byte by byte, each in a packet of its own, and reads it back.
    Dribble {
        /// Host and port.
        #[arg(long)]
        to: String,
        /// Length of the line.
        #[arg(long, default_value_t = 200)]
        bytes: usize,
    },
    /// Opens a connection, says so in a first line of JSON, and exchanges a line on it every 100 ms
    /// until standard input ends; then tells how that went.
    Hold {
        /// Host and port.
        #[arg(long)]
        to: String,
    },
    /// Opens connections to TCP servers all the time and keeps some more in use, until standard input
    /// ends; tells how that went then, and whenever a line comes in.
    Traffic(Traffic),
    /// Sends a text, closes its own direction and reads the answer that comes only then.
    HalfClose {
        /// Host and port.
        #[arg(long)]
        to: String,
        /// The text.
        #[arg(long, default_value = "ping")]
        text: String,
    },
    /// Opens a connection and closes it.
    Connect {
        /// Host and port.
        #[arg(long)]
        to: String,
    },
    /// Gets a page, several times if asked to.
    Http {
        /// Address of the page.
        url: Uri,
        /// Number of requests.
        #[arg(short = 'n', long, default_value_t = 1)]
        requests: usize,
        /// All requests on one connection.
        #[arg(long)]
        keep_alive: bool,
        /// HTTP/2 without TLS.
        #[arg(long)]
        h2: bool,
    },
    /// Gets a page of the server's pattern and checks every byte.
    Download {
        /// Address of the page.
        url: Uri,
    },
    /// Posts bytes of the pattern and checks the sum that the server sends back.
    Upload {
        /// Address of the page.
        url: Uri,
        /// Number of bytes.
        #[arg(long)]
        bytes: u64,
    },
    /// Sends a datagram and reads the answer.
    Udp {
        /// Host and port.
        #[arg(long)]
        to: String,
        /// The datagram.
        #[arg(long, default_value = "ping")]
        text: String,
    },
    /// Sends an ICMP echo request and waits for its reply.
    Ping {
        /// Address.
        #[arg(long)]
        to: IpAddr,
    },
    /// Looks a name up.
    Resolve {
        /// The name.
        name: String,
    },
    /// Speaks to a node's proxy as another proxy does: mutual TLS 1.3, HTTP/2, CONNECT.
    Hbone {
        /// Host and port of the proxy.
        #[arg(long)]
        to: String,
        /// Authority of the CONNECT.
        #[arg(long)]
        authority: String,
        /// Read a certificate and its key from standard input, as PEM; without, none is presented.
        #[arg(long)]
        certificate: bool,
        /// A line for the server behind the proxy, if it is reached.
        #[arg(long, default_value = "ping")]
        text: String,
    },
}

/// What traffic is made.
#[derive(Args)]
pub(crate) struct Traffic {
    /// Where to, in turns.
    #[arg(long, required = true)]
    pub(crate) to: Vec<Target>,
    /// New connections a second.
    #[arg(long, default_value_t = 50)]
    pub(crate) rate: u32,
    /// Connections to each target that are kept in use besides.
    #[arg(long, default_value_t = 1)]
    pub(crate) held: usize,
    /// The line that is sent on each.
    #[arg(long, default_value = "ping")]
    pub(crate) text: String,
}

/// A TCP server: `PODS=ADDRESS`, the pods that may answer there, joined by `|`, and where to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) pods: Vec<String>,
    pub(crate) address: SocketAddr,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (pods, address) = text
            .split_once('=')
            .ok_or("no '=' between pods and address")?;
        let address = address
            .parse()
            .map_err(|_| format!("{address:?} is no address and port"))?;
        let pods = pods.split('|').map(str::to_owned).collect();
        Ok(Self { pods, address })
    }
}

/// Ports of the servers.
#[derive(Args, Clone, Copy)]
pub(crate) struct Ports {
    /// TCP: greets, and sends back what it gets.
    #[arg(long, default_value_t = 9000)]
    pub(crate) tcp: u16,
    /// TCP: answers once the client has closed its direction.
    #[arg(long, default_value_t = 9001)]
    pub(crate) after_end: u16,
    /// HTTP/1.1 and HTTP/2 without TLS.
    #[arg(long, default_value_t = 8080)]
    pub(crate) http: u16,
    /// UDP: sends back what it gets.
    #[arg(long, default_value_t = 9000)]
    pub(crate) udp: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_names_who_may_answer() {
        let target: Target = "a|b=[fd00::1]:9000".parse().unwrap();
        assert_eq!(target.pods, ["a", "b"]);
        assert_eq!(target.address, "[fd00::1]:9000".parse().unwrap());
        for wrong in ["10.0.0.1:9000", "a=somewhere:9000", "a=10.0.0.1"] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }
}
