//! `docs/promises.md` names a test for each promise; every one of them exists and runs.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// How a reason to ignore a test ends if ring 5 (`tests/run-geneve-ring`) runs it.
const RING_5: &str = ": ring 5\"]";

/// First line of every table of promises.
const HEADER: &str = "| promise | shown by |";

#[test]
fn every_promise_names_a_test_that_runs() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("the workspace")?;
    let promises = fs::read_to_string(root.join("docs/promises.md"))?;
    let rows: Vec<&str> = promises
        .lines()
        .filter(|line| line.starts_with("| ") && *line != HEADER)
        .collect();
    ensure!(rows.len() > 20, "docs/promises.md has {} rows", rows.len());
    let tests = tests_below(root)?;
    for row in rows {
        let named: Vec<&str> = row
            .split('`')
            .skip(1)
            .step_by(2)
            .filter(|word| is_test_name(word))
            .collect();
        ensure!(
            !named.is_empty(),
            "no test is named for this promise: {row}"
        );
        for name in named {
            ensure!(
                tests.contains(name),
                "there is no test `{name}`, or it does not run: {row}"
            );
        }
    }
    Ok(())
}

/// A test is named by a sentence: words joined by underscores, or Go's way.
fn is_test_name(word: &str) -> bool {
    let in_rust = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let in_go = |name: &str| name.len() > 10 && name.chars().all(|c| c.is_ascii_alphanumeric());
    word.contains('_') && word.chars().all(in_rust) || word.strip_prefix("Test").is_some_and(in_go)
}

/// Names of all test functions of the workspace that some ring runs.
fn tests_below(root: &Path) -> Result<BTreeSet<String>> {
    let mut tests = BTreeSet::new();
    let mut folders: Vec<_> = ["crds", "protocol", "controller", "node-agent", "tests"]
        .map(|name| root.join(name))
        .to_vec();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("{}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("rs") => tests.extend(tests_in(&fs::read_to_string(&path)?)),
                Some("go") => tests.extend(tests_in_go(&fs::read_to_string(&path)?)),
                _ => {}
            }
        }
    }
    Ok(tests)
}

fn tests_in(source: &str) -> Vec<String> {
    let mut names = Vec::new();
    let (mut is_test, mut ignored) = (false, false);
    for line in source.lines().map(str::trim) {
        match line {
            "#[test]" => is_test = true,
            _ if line.starts_with("#[tokio::test") => is_test = true,
            _ if line.starts_with("#[ignore") => ignored = !line.ends_with(RING_5),
            _ => {
                let Some(name) = line
                    .split("fn ")
                    .nth(1)
                    .and_then(|rest| rest.split('(').next())
                else {
                    continue;
                };
                if is_test && !ignored {
                    names.push(name.to_owned());
                }
                (is_test, ignored) = (false, false);
            }
        }
    }
    names
}

fn tests_in_go(source: &str) -> Vec<String> {
    let named = |line: &str| {
        let name = line.strip_prefix("func ")?.split('(').next()?;
        name.starts_with("Test").then(|| name.to_owned())
    };
    source.lines().filter_map(named).collect()
}

#[test]
fn an_ignored_test_shows_no_promise() {
    let source = "#[test]\nfn runs() {}\n#[test]\n#[ignore]\nfn sleeps() {}\nfn helper() {}\n";
    assert_eq!(tests_in(source), ["runs"]);
    let elsewhere =
        format!("#[test]\n#[ignore = \"needs a guest{RING_5}\nfn runs_in_a_guest() {{}}\n");
    assert_eq!(tests_in(&elsewhere), ["runs_in_a_guest"]);
}
