//! Runs a program to its end and hands back what it printed.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// What a program printed, and whether it succeeded.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code 0.
    pub ok: bool,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// Standard output of a program that succeeded.
    ///
    /// # Errors
    /// If it failed; carries all it printed.
    pub fn success(self) -> Result<String> {
        if !self.ok {
            bail!("failed: {}{}", self.stdout, self.stderr);
        }
        Ok(self.stdout)
    }

    /// All that a program printed, if it failed as it should.
    ///
    /// # Errors
    /// If it succeeded.
    pub fn failure(self) -> Result<String> {
        if self.ok {
            bail!("succeeded where a failure was expected: {}", self.stdout);
        }
        Ok(self.stdout + &self.stderr)
    }
}

/// Runs `command` with `input` on its standard input.
///
/// # Errors
/// If it cannot be started; a failing exit code is part of the [`Outcome`].
pub fn run(command: &mut Command, input: &str) -> Result<Outcome> {
    let name = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let mut stdin = child.stdin.take().context("no standard input")?;
    let input = input.to_owned();
    // A program may end without reading its input; what it said about it is in its output.
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()).is_ok());
    let Output {
        status,
        stdout,
        stderr,
    } = child
        .wait_with_output()
        .with_context(|| format!("wait for {name}"))?;
    drop(writer.join());
    Ok(Outcome {
        ok: status.success(),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
    })
}

/// Runs `program` with `arguments`; its standard output if it succeeds.
///
/// # Errors
/// If it cannot be started or fails.
pub fn output(program: &str, arguments: &[&str]) -> Result<String> {
    run(Command::new(program).args(arguments), "")?
        .success()
        .with_context(|| format!("{program} {}", arguments.join(" ")))
}
