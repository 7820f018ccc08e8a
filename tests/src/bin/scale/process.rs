//! What a process costs, from `/proc`.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// A process of this machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Process(pub(crate) u32);

/// Processor time that a process has had so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    used: Duration,
    at: Instant,
}

/// What a process cost in a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Processors that it kept busy, on average.
    pub(crate) processors: f64,
    /// Processor time.
    pub(crate) used: Duration,
    /// Resident memory at the end, in bytes.
    pub(crate) memory: u64,
}

impl Process {
    pub(crate) fn load(self) -> Result<Load> {
        let text = self.read("stat")?;
        // The name, in parentheses, may hold anything.
        let (_, fields) = text.rsplit_once(')').context("no name in /proc/PID/stat")?;
        let mut fields = fields.split_whitespace().skip(11);
        let mut ticks = || -> Result<u64> {
            let field = fields.next().context("/proc/PID/stat is short")?;
            Ok(field.parse()?)
        };
        let ticks = ticks()? + ticks()?;
        // USER_HZ is 100 on every architecture that Linux shows to programs (time(7)).
        let used = Duration::from_millis(ticks * 10);
        let at = Instant::now();
        Ok(Load { used, at })
    }

    /// The most memory that it ever had resident, in bytes.
    pub(crate) fn peak_memory(self) -> Result<u64> {
        self.memory("VmHWM:")
    }

    fn memory(self, field: &str) -> Result<u64> {
        let status = self.read("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let words = line.with_context(|| format!("no {field}"))?;
        let kib: u64 = words.trim().trim_end_matches(" kB").parse()?;
        Ok(kib * 1024)
    }

    fn read(self, file: &str) -> Result<String> {
        let path = format!("/proc/{}/{file}", self.0);
        fs::read_to_string(&path).with_context(|| format!("read {path}"))
    }
}

impl Load {
    pub(crate) fn until(&self, process: &Process) -> Result<Cost> {
        let now = process.load()?;
        let used = now.used.saturating_sub(self.used);
        Ok(Cost {
            processors: used.as_secs_f64() / (now.at - self.at).as_secs_f64(),
            used,
            memory: process.memory("VmRSS:")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_what_it_costs() -> Result<()> {
        let own = Process(std::process::id());
        let load = own.load()?;
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(100) {
            std::hint::black_box(start);
        }
        let cost = load.until(&own)?;
        anyhow::ensure!(
            cost.used > Duration::ZERO && cost.processors > 0.0,
            "{cost:?}"
        );
        anyhow::ensure!(
            cost.memory > 0 && own.peak_memory()? >= cost.memory,
            "{cost:?}"
        );
        Ok(())
    }
}
