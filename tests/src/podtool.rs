//! `podtool` where the traffic starts: in a pod, on a node, or in a network namespace of this machine.

mod session;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cluster::{Cluster, node_words, setting};
use crate::command;
use crate::process::Process;

/// Where `podtool` runs.
#[derive(Clone, Debug)]
pub struct Place {
    /// The command line up to `podtool`'s own arguments.
    prefix: Vec<String>,
    /// Whether one `podtool` serves many calls there.
    kept: bool,
}

impl Place {
    /// A pod of the podtool image.
    #[must_use]
    pub fn pod(cluster: &Cluster, namespace: &str, pod: &str) -> Self {
        let words = [
            cluster.program(),
            "-n",
            namespace,
            "exec",
            "-i",
            pod,
            "--",
            "podtool",
        ];
        Self {
            prefix: words.map(str::to_owned).to_vec(),
            kept: true,
        }
    }

    /// A node, as a process of its own; `binary` is podtool's file, which nodes see too.
    ///
    /// # Errors
    /// If there is no cluster.
    pub fn node(node: &str, binary: &str) -> Result<Self> {
        let mut prefix = node_words(node)?;
        prefix.push(binary.to_owned());
        Ok(Self::here(prefix))
    }

    /// The network namespace of a process of a node.
    ///
    /// # Errors
    /// If there is no cluster.
    pub fn process(process: &Process, binary: &str) -> Result<Self> {
        let mut prefix = node_words(&process.node)?;
        let net = format!("--net=/proc/{}/ns/net", process.pid);
        prefix.extend(["nsenter", &net, binary].map(str::to_owned));
        Ok(Self::here(prefix))
    }

    /// The namespace on the nodes' network that is outside the cluster.
    ///
    /// # Errors
    /// If the cluster has none.
    pub fn outside(binary: &str) -> Result<Self> {
        let net = format!("--net=/run/netns/{}", setting("AMBIT_OUTSIDE_NETNS")?);
        Ok(Self::here(
            ["nsenter", &net, binary].map(str::to_owned).to_vec(),
        ))
    }

    /// Where a process is started at once, and must not outlive its call: it would keep a namespace.
    fn here(prefix: Vec<String>) -> Self {
        Self {
            prefix,
            kept: false,
        }
    }

    /// Runs a client to its end; what it saw, or its error in the field `error`.
    ///
    /// # Errors
    /// If it cannot be started or prints no JSON.
    pub fn attempt(&self, arguments: &[&str], input: &str) -> Result<Value> {
        if self.kept && input.is_empty() {
            return session::call(&self.prefix, arguments);
        }
        let outcome = command::run(&mut self.command(arguments), input)?;
        let line = outcome.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line).with_context(|| {
            format!(
                "podtool {} printed {line:?} {}",
                arguments.join(" "),
                outcome.stderr
            )
        })
    }

    /// Runs a client that succeeds; what it saw.
    ///
    /// # Errors
    /// If it fails.
    pub fn run(&self, arguments: &[&str]) -> Result<Value> {
        let seen = self.attempt(arguments, "")?;
        ensure!(
            seen["error"].is_null(),
            "podtool {}: {seen}",
            arguments.join(" ")
        );
        Ok(seen)
    }

    /// Sends a line to a TCP server of podtool; the client's address as the server sees it.
    ///
    /// # Errors
    /// If the line does not come back.
    pub fn send(&self, to: &str) -> Result<String> {
        peer_ip(&self.run(&["send", "--to", to])?)
    }

    /// Opens a connection and keeps it in use.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn hold(&self, to: &str) -> Result<Held> {
        let mut child = self
            .command(&["hold", "--to", to])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start podtool hold")?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().context("no standard output")?);
        let mut held = Held {
            child,
            input,
            output,
        };
        let opened = held.line()?;
        ensure!(opened["error"].is_null(), "{opened}");
        Ok(held)
    }

    /// Starts podtool's servers here.
    ///
    /// # Errors
    /// If they cannot be started.
    pub fn serve(&self) -> Result<Serving> {
        let mut child = self.command(&["serve"]).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        let output = child.stdout.take().context("no standard output")?;
        let serving = Serving(child);
        BufReader::new(output).read_line(&mut line)?;
        ensure!(line.trim() == "listening", "podtool serve printed {line:?}");
        Ok(serving)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.prefix[0]);
        command.args(&self.prefix[1..]).args(arguments);
        command
    }
}

/// The address in what podtool saw, without its port.
///
/// # Errors
/// If there is none.
pub fn peer_ip(seen: &Value) -> Result<String> {
    let peer = seen["peer"]
        .as_str()
        .with_context(|| format!("no peer in {seen}"))?;
    let peer: SocketAddr = peer
        .parse()
        .with_context(|| format!("no address and port: {peer}"))?;
    Ok(peer.ip().to_string())
}

/// A connection that is in use all the time.
#[derive(Debug)]
pub struct Held {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Held {
    /// Ends it.
    ///
    /// # Errors
    /// If it was cut, or ever stood still for longer than `limit`.
    pub fn end_uncut(mut self, limit: Duration) -> Result<()> {
        let seen = self.end()?;
        ensure!(seen["cut"].is_null(), "the connection was cut: {seen}");
        let longest = seen["longest_ms"].as_u64().context("longest_ms")?;
        ensure!(
            u128::from(longest) <= limit.as_millis(),
            "the connection stood still: {seen}"
        );
        Ok(())
    }

    /// Ends it; what it saw.
    ///
    /// # Errors
    /// If it says nothing.
    pub fn end(&mut self) -> Result<Value> {
        drop(self.input.take());
        self.line()
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        if line.is_empty() {
            bail!("podtool hold ended without a word");
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.input.take());
        // It ends by itself once its input has; what has ended already cannot be ended.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Servers that run until this is dropped.
#[derive(Debug)]
pub struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
