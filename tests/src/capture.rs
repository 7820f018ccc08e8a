//! What is on the wire between the nodes, taken with tcpdump.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::cluster::setting;
use crate::command;
use crate::wait::eventually;

/// So many packets that should not be are told.
const TOLD: usize = 20;

/// The filter for TCP from and to any of these addresses.
#[must_use]
pub fn tcp_of(ips: &[IpAddr]) -> String {
    let hosts: Vec<String> = ips.iter().map(|ip| format!("host {ip}")).collect();
    format!("tcp and ({})", hosts.join(" or "))
}

/// A running capture of one link; stops when dropped.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Child,
    file: PathBuf,
}

/// A finished capture.
#[derive(Debug)]
pub struct Captured {
    file: PathBuf,
}

impl Capture {
    /// Captures what `filter` (pcap-filter(7)) lets through on the link between the nodes.
    ///
    /// # Errors
    /// If tcpdump does not start to listen.
    pub fn start(name: &str, filter: &str) -> Result<Self> {
        let link = setting("AMBIT_NODE_LINK")?;
        let file = std::env::temp_dir().join(format!("ambit-{}-{name}.pcap", std::process::id()));
        let tcpdump = Command::new("tcpdump")
            .args([
                "-i",
                &link,
                "--immediate-mode",
                "-U",
                "-s",
                "0",
                "-Z",
                "root",
                "-w",
            ])
            .arg(&file)
            .arg(filter)
            .stderr(Stdio::null())
            .spawn()
            .context("start tcpdump")?;
        let capture = Self { tcpdump, file };
        // The file's header is written once the socket is open.
        eventually(Duration::from_secs(10), "tcpdump listens", || {
            let written = std::fs::metadata(&capture.file).map_or(0, |file| file.len());
            if written == 0 {
                bail!("{} is empty", capture.file.display())
            }
            Ok(())
        })?;
        Ok(capture)
    }

    /// Ends the capture.
    ///
    /// # Errors
    /// If tcpdump cannot be ended.
    pub fn stop(mut self) -> Result<Captured> {
        // The last packets reach the file a moment after they were sent.
        std::thread::sleep(Duration::from_millis(300));
        command::output("kill", &["-INT", &self.tcpdump.id().to_string()])?;
        self.tcpdump.wait()?;
        Ok(Captured {
            file: std::mem::take(&mut self.file),
        })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // Already ended where `stop` was called; both calls fail then, and may.
        drop(self.tcpdump.kill());
        drop(self.tcpdump.wait());
        drop(std::fs::remove_file(&self.file));
    }
}

impl Captured {
    /// Whether these bytes are anywhere in the capture.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn contains(&self, needle: &str) -> Result<bool> {
        let bytes = std::fs::read(&self.file)?;
        Ok(bytes
            .windows(needle.len())
            .any(|window| window == needle.as_bytes()))
    }

    /// Fails if anything went another way than to the proxies' port for HBONE, or if the marker can be read.
    ///
    /// # Errors
    /// If that is so, or the capture cannot be read.
    pub fn ensure_encrypted(&self, marker: &str) -> Result<()> {
        ensure!(!self.contains(marker)?, "the marker is on the wire");
        let clear = self.packets("not tcp port 15008")?;
        let first = &clear[..clear.len().min(TOLD)];
        ensure!(clear.is_empty(), "not encrypted: {first:#?}");
        Ok(())
    }

    /// One line a packet that `filter` lets through.
    ///
    /// # Errors
    /// If tcpdump cannot read the capture.
    pub fn packets(&self, filter: &str) -> Result<Vec<String>> {
        let file = self.file.to_string_lossy();
        let lines = command::output("tcpdump", &["-nn", "-r", &file, filter])?;
        Ok(lines.lines().map(str::to_owned).collect())
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.file));
    }
}
