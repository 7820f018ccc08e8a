//! The program, running.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

pub(crate) const CONTROLLER_PORT: u16 = 15012;
pub(crate) const TOKEN: &str = "the-token";

pub(crate) struct Program {
    folder: TempDir,
    child: std::cell::RefCell<Child>,
    pub(crate) pid: Pid,
}

/// Runs a test in a network namespace of its own, with the program running in it.
pub(crate) fn in_namespace(test: impl AsyncFnOnce(&Program) + Send + 'static) {
    in_namespace_for(Duration::from_secs(30), test);
}

/// The same with another limit, for work that comes to something.
pub(crate) fn in_namespace_for<T: Send + 'static>(
    limit: Duration,
    work: impl AsyncFnOnce(&Program) -> T + Send + 'static,
) -> T {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        for command in ["link set lo up", "address add 10.1.0.1/32 dev lo"] {
            let mut ip = std::process::Command::new("ip");
            assert!(ip.args(command.split(' ')).status().unwrap().success());
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(async {
            let program = Program::start().await;
            let done = tokio::time::timeout(limit, work(&program)).await;
            done.unwrap_or_else(|_| panic!("it hangs; the program's log:\n{}", program.log()))
        })
    });
    match thread.join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

impl Program {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        // As in the manifest, a projected token ends without a newline; an edited one does not.
        std::fs::write(at("token"), format!("{TOKEN}\n")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_ambit-proxy"))
            .arg(format!("--controller=https://localhost:{CONTROLLER_PORT}"))
            .arg("--root-cert")
            .arg(at("root-cert.pem"))
            .arg("--token")
            .arg(at("token"))
            .arg("--agent-socket")
            .arg(at("agent.sock"))
            .args([
                "--pod-name=proxy-1",
                "--pod-uid=proxy-uid",
                "--pod-ip=10.3.0.1",
            ])
            .args(["--node-name=node-1", "--drain-seconds=2"])
            .stdout(File::create(at("log")).unwrap())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let pid = Pid::from_raw(child.id().unwrap().try_into().unwrap());
        let program = Self {
            folder,
            child: child.into(),
            pid,
        };
        while !program.listens(15000).await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        program
    }

    /// Where its files are.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// Waits until the log says this.
    pub(crate) async fn logs(&self, part: &str) {
        while !self.log().contains(part) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) async fn listens(&self, port: u16) -> bool {
        self.listens_at("127.0.0.1", port).await
    }

    pub(crate) async fn listens_at(&self, ip: &str, port: u16) -> bool {
        // What is accepted and reset at once is listened on too.
        let refused = |error: std::io::Error| error.kind() == ErrorKind::ConnectionRefused;
        !TcpStream::connect((ip, port)).await.is_err_and(refused)
    }

    /// The whole answer of an HTTP request.
    pub(crate) async fn get(&self, port: u16, path: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: proxy\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    pub(crate) async fn get_json(&self, port: u16, path: &str) -> serde_json::Value {
        let answer = self.get(port, path).await;
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"))
    }

    /// The value of a metric, named with its labels.
    pub(crate) async fn metric(&self, name: &str) -> Option<String> {
        let page = self.get(15020, "/metrics").await;
        let value = page.lines().find_map(|line| line.strip_prefix(name));
        value.map(|value| value.trim().to_owned())
    }

    /// Waits until a metric has this value.
    pub(crate) async fn says_metric(&self, name: &str, value: &str) {
        while self.metric(name).await.as_deref() != Some(value) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid, signal).unwrap();
    }

    pub(crate) async fn ended(&self) -> ExitStatus {
        loop {
            if let Some(status) = self.child.borrow_mut().try_wait().unwrap() {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// When a certificate ends, in seconds since 1970, as openssl and date say it.
pub(crate) fn end_of(base64_pem: &str) -> String {
    let mut shell = std::process::Command::new("bash");
    let end = "openssl x509 -noout -enddate -dateopt iso_8601 <<<\"$(base64 -d <<<\"$1\")\" | cut -d= -f2";
    let script = format!("date -d \"$({end})\" +%s");
    let output = shell
        .args(["-c", &script, "end", base64_pem])
        .output()
        .unwrap();
    let end = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    assert!(
        !end.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    end
}
