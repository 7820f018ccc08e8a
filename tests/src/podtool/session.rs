//! A `podtool` that runs one client after another: to start one in a pod takes far longer than what most clients do.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Those that wait for work, by their command line. They end by themselves when this process does.
static IDLE: Mutex<BTreeMap<Vec<String>, Vec<Session>>> = Mutex::new(BTreeMap::new());

/// Runs one client; what it printed. `podtool` is the command line up to its own arguments.
pub(super) fn call(podtool: &[String], arguments: &[&str]) -> Result<Value> {
    let mut session = match idle(podtool) {
        Some(session) => session,
        None => Session::start(podtool)?,
    };
    let seen = session.call(arguments)?;
    // Only one that has answered is used again.
    let mut all = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    all.entry(podtool.to_vec()).or_default().push(session);
    Ok(seen)
}

/// One that waits and still runs.
fn idle(podtool: &[String]) -> Option<Session> {
    let mut all = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    let waiting = all.get_mut(podtool)?;
    while let Some(mut session) = waiting.pop() {
        if matches!(session.child.try_wait(), Ok(None)) {
            return Some(session);
        }
    }
    None
}

struct Session {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Session {
    fn start(podtool: &[String]) -> Result<Self> {
        let mut child = Command::new(&podtool[0])
            .args(&podtool[1..])
            .arg("obey")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", podtool.join(" ")))?;
        let input = child.stdin.take().context("no standard input")?;
        let output = BufReader::new(child.stdout.take().context("no standard output")?);
        Ok(Self {
            child,
            input,
            output,
        })
    }

    fn call(&mut self, arguments: &[&str]) -> Result<Value> {
        let mut line = String::new();
        // Where it has ended already, its own words say more than the broken pipe.
        if writeln!(self.input, "{}", json!(arguments)).is_ok() {
            self.output.read_line(&mut line)?;
        }
        if line.is_empty() {
            let mut words = String::new();
            if let Some(mut errors) = self.child.stderr.take() {
                errors.read_to_string(&mut words)?;
            }
            bail!("podtool ended without an answer: {words}");
        }
        serde_json::from_str(&line).with_context(|| format!("podtool printed {line:?}"))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // One that has ended cannot be ended again.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
