//! `ambit-cni`: the last plugin of a chain (CNI 0.3 to 1.1). On ADD it holds the pod's TCP back if the
//! agent has ordered so for its namespace; of every other pod it hands on what the plugin before it said.
//!
//! ```text
//!  environment, configuration ─▶ call ─▶ act (orders, device, record, rules) ─▶ answer
//! ```

mod act;
mod answer;
mod call;
mod device;
mod netlink;
mod rules;

use std::io::Read;
use std::process::ExitCode;

use call::Call;

fn main() -> ExitCode {
    let mut input = Vec::new();
    let call = std::io::stdin()
        .read_to_end(&mut input)
        .map_err(call::CallError::Input)
        .and_then(|_| Call::parse(&input, |name| std::env::var(name).ok()));
    let (version, done) = match call {
        Ok(call) => (call.version.clone(), act::act(&call)),
        Err(error) => (call::NEWEST.to_owned(), Err(error.into())),
    };
    let (text, code) = match done {
        Ok(answer) => (answer.map(|answer| answer.to_string()), ExitCode::SUCCESS),
        Err(error) => (Some(answer::failure(&version, &error)), ExitCode::FAILURE),
    };
    // A runtime that does not listen any more needs no answer.
    if let Some(text) = text
        && std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes()).is_err()
    {
        return ExitCode::FAILURE;
    }
    code
}
