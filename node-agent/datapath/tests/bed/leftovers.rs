//! A process that is killed drops no bed. Its namespaces go all the same: at once, by a shell that outlives it, and
//! should that have been killed too, before the next process makes its first bed.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

const FOLDER: &str = "/run/netns";

/// Start of the names of all namespaces.
const START: &str = "ambit-t";

/// Waits for the end of its input, then deletes the namespaces whose names start so; twice, for what the process had
/// started may end after it.
const SCRIPT: &str = r#"
cat >/dev/null
for try in 1 2; do
  for namespace in /run/netns/"$1"*; do
    [ ! -e "$namespace" ] || ip netns delete "${namespace##*/}"
  done
  sleep 1
done
"#;

/// Start of the names of a process's namespaces.
pub(crate) fn prefix(process: u32) -> String {
    format!("{START}{process}-")
}

/// Sees to it, once for all beds of this process, that none of them is left behind and none is there.
pub(crate) fn prevent() {
    static SHELL: OnceLock<Child> = OnceLock::new();
    SHELL.get_or_init(|| {
        remove_those_of_the_dead();
        shell_that_outlives()
    });
}

/// Its input ends with this process, however that ends; a signal to the process's group does not reach it.
fn shell_that_outlives() -> Child {
    Command::new("sh")
        .args(["-c", SCRIPT, "sh", &prefix(std::process::id())])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap()
}

/// Removes the namespaces of processes that are no more.
pub(crate) fn remove_those_of_the_dead() {
    // Without the folder there has never been one.
    for entry in std::fs::read_dir(FOLDER).into_iter().flatten() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let alive = process_of(&name).is_none_or(|process| process.exists());
        if alive {
            continue;
        }
        let deleted = Command::new("ip")
            .args(["netns", "delete", &name])
            .output()
            .unwrap();
        // Another process's first bed may have been faster.
        assert!(
            deleted.status.success() || !Path::new(FOLDER).join(&name).exists(),
            "{name} is left of an earlier test, and stays: {deleted:?}"
        );
    }
}

/// The process whose bed has a namespace of this name.
fn process_of(name: &str) -> Option<PathBuf> {
    let (process, _) = name.strip_prefix(START)?.split_once('-')?;
    let process: u32 = process.parse().ok()?;
    Some(Path::new("/proc").join(process.to_string()))
}
