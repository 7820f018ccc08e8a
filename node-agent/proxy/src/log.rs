//! Logs to standard output. Lines are gathered and written together, by a thread of their own: a
//! connection never waits for the log, and many lines cost one system call.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

use crate::args::LogFormat;

/// Bytes that wait at most; what comes on top is counted and left out.
const WAITING: usize = 4 << 20;
/// How long lines are gathered.
const GATHER: Duration = Duration::from_millis(20);

/// Changes what is logged.
pub(crate) type Levels = reload::Handle<EnvFilter, Registry>;

/// The logs of the process.
pub(crate) struct Logs {
    levels: Levels,
    sink: Sink,
    writer: Option<JoinHandle<()>>,
}

/// Takes lines.
#[derive(Clone, Debug, Default)]
struct Sink(Arc<Gathered>);

#[derive(Debug, Default)]
struct Gathered {
    lines: Mutex<Lines>,
    something: Condvar,
}

#[derive(Debug, Default)]
struct Lines {
    text: Vec<u8>,
    left_out: u64,
    ended: bool,
}

/// Starts logging.
pub(crate) fn start(format: LogFormat) -> Logs {
    let sink = Sink::default();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let (filter, levels) = reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_writer(sink.clone());
    let lines = match format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .init();
    let gathered = sink.clone();
    let writer = std::thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || gathered.write_all_to(&mut io::stdout().lock()));
    // Without a thread lines are lost, but the proxy works.
    let writer = writer.ok();
    Logs {
        levels,
        sink,
        writer,
    }
}

impl Logs {
    pub(crate) fn levels(&self) -> Levels {
        self.levels.clone()
    }

    /// Writes what still waits.
    pub(crate) fn finish(self) {
        self.sink.lock().ended = true;
        self.sink.0.something.notify_one();
        if let Some(writer) = self.writer
            && writer.join().is_err()
        {
            eprintln!("the thread that writes logs has died");
        }
    }
}

impl Sink {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        let lines = self.0.lines.lock();
        lines.unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes lines until the end of the process.
    fn write_all_to(&self, output: &mut impl Write) {
        let mut text = Vec::new();
        loop {
            let waited = self
                .0
                .something
                .wait_while(self.lock(), |lines| lines.text.is_empty() && !lines.ended);
            let mut lines = waited.unwrap_or_else(PoisonError::into_inner);
            let ended = lines.ended;
            let left_out = std::mem::take(&mut lines.left_out);
            std::mem::swap(&mut lines.text, &mut text);
            drop(lines);
            if left_out > 0 {
                text.extend_from_slice(format!("{left_out} log lines were left out\n").as_bytes());
            }
            // Nobody reads the log any more: there is nobody to tell.
            let _: io::Result<()> = output.write_all(&text).and_then(|()| output.flush());
            text.clear();
            text.shrink_to(64 << 10);
            if ended {
                return;
            }
            std::thread::sleep(GATHER);
        }
    }
}

impl Write for Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut lines = self.lock();
        if lines.text.len() + line.len() > WAITING {
            lines.left_out += 1;
            return Ok(line.len());
        }
        let was_empty = lines.text.is_empty();
        lines.text.extend_from_slice(line);
        drop(lines);
        if was_empty {
            self.0.something.notify_one();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_out_in_order_and_what_is_too_much_is_counted() {
        let sink = Sink::default();
        let mut writer = sink.clone();
        writer.write_all(b"first\n").unwrap();
        let filler = vec![b'x'; WAITING - 6];
        writer.write_all(&filler).unwrap();
        writer.write_all(b"too much\n").unwrap();
        sink.lock().ended = true;
        let mut output = Vec::new();
        sink.write_all_to(&mut output);
        assert!(output.starts_with(b"first\n"));
        assert!(output.ends_with(b"1 log lines were left out\n"));
    }
}
