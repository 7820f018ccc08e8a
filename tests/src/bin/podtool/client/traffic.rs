//! New connections all the time, and some that are kept in use.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use mesh_tests::load::report::{Failure, Held, Report};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::tcp::{self, Lines, PAUSE};
use super::within;
use crate::args::{Target, Traffic};
use crate::seen::Seen;

/// So many connections that wait for something are more than any server would have let come to be.
const IN_FLIGHT: usize = 2000;

/// What all connections share.
struct Shared {
    text: String,
    limit: Duration,
    report: Mutex<Report>,
}

/// Makes traffic until standard input ends; a line on it asks for a report.
pub(super) async fn run(wanted: Traffic, limit: Duration) -> Result<Value> {
    let shared = Arc::new(Shared {
        text: wanted.text,
        limit,
        report: Mutex::default(),
    });
    let (end, ended) = watch::channel(false);
    let mut kept = JoinSet::new();
    for target in &wanted.to {
        for _ in 0..wanted.held {
            let keep = keep(shared.clone(), target.clone(), ended.clone());
            kept.spawn(keep);
        }
    }
    let asked = tokio::spawn(answer_lines(shared.clone()));
    let mut once = JoinSet::new();
    let mut every = tokio::time::interval(Duration::from_secs(1) / wanted.rate.max(1));
    every.set_missed_tick_behavior(MissedTickBehavior::Burst);
    for target in wanted.to.iter().cycle() {
        if asked.is_finished() {
            break;
        }
        every.tick().await;
        while once.try_join_next().is_some() {}
        if once.len() < IN_FLIGHT {
            once.spawn(attempt(shared.clone(), target.clone()));
        } else {
            shared.failed(target, Instant::now(), &anyhow::anyhow!("too many wait"));
        }
    }
    end.send_replace(true);
    while once.join_next().await.is_some() {}
    while kept.join_next().await.is_some() {}
    asked.await??;
    shared.told()
}

/// Prints a report for each line of standard input, until that ends.
async fn answer_lines(shared: Arc<Shared>) -> Result<()> {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while lines.next_line().await?.is_some() {
        println!("{}", shared.told()?);
    }
    Ok(())
}

/// One connection: greeted, a line there and back, and a proper end.
async fn attempt(shared: Arc<Shared>, target: Target) {
    let start = Instant::now();
    let outcome = within(shared.limit, async {
        let (mut stream, seen) = open(&target).await?;
        tcp::exchange(&mut stream, &shared.text).await?;
        stream.get_mut().shutdown().await?;
        let mut rest = Vec::new();
        let read = stream.read_to_end(&mut rest).await;
        read.context("wait for the server's end")?;
        ensure!(rest.is_empty(), "the server sent {rest:?} at the end");
        Ok(seen.pod)
    });
    match outcome.await {
        Ok(pod) => {
            let mut report = shared.report();
            report.attempts += 1;
            *report.answers.entry(pod).or_default() += 1;
            report.longest_ms = report.longest_ms.max(milliseconds(start.elapsed()));
        }
        Err(error) => shared.failed(&target, start, &error),
    }
}

/// Keeps a connection in use; opens another when it is cut.
async fn keep(shared: Arc<Shared>, target: Target, mut ended: watch::Receiver<bool>) {
    while !*ended.borrow_and_update() {
        let start = Instant::now();
        match within(shared.limit, open(&target)).await {
            Err(error) => shared.failed(&target, start, &error),
            Ok((mut stream, seen)) => {
                let place = shared.opened(&target, seen.pod);
                use_until(&shared, place, &mut stream, &mut ended).await;
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn use_until(
    shared: &Shared,
    place: usize,
    stream: &mut Lines,
    ended: &mut watch::Receiver<bool>,
) {
    while !*ended.borrow_and_update() {
        let start = Instant::now();
        let exchanged = within(shared.limit, tcp::exchange(stream, &shared.text)).await;
        match exchanged {
            Ok(()) => shared.exchanged(place, start.elapsed()),
            Err(error) => return shared.cut(place, &error),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Connects and checks who says hello, and to whom.
async fn open(target: &Target) -> Result<(Lines, Seen)> {
    let (stream, seen) = tcp::greeted(&target.address.to_string()).await?;
    ensure!(
        target.pods.contains(&seen.pod),
        "{} answered instead of {:?}",
        seen.pod,
        target.pods
    );
    let own: SocketAddr = stream.get_ref().local_addr()?;
    ensure!(
        seen.peer.ip() == own.ip(),
        "the server saw {} and not {own}",
        seen.peer
    );
    Ok((stream, seen))
}

impl Shared {
    fn report(&self) -> std::sync::MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn told(&self) -> Result<Value> {
        Ok(json!(*self.report()))
    }

    fn opened(&self, target: &Target, pod: String) -> usize {
        let mut report = self.report();
        report.held.push(Held {
            to: target.address,
            pod,
            opened_ms: now(),
            exchanges: 0,
            longest_ms: 0,
            cut_ms: None,
            error: None,
        });
        report.held.len() - 1
    }

    fn exchanged(&self, place: usize, took: Duration) {
        let held = &mut self.report().held[place];
        held.exchanges += 1;
        held.longest_ms = held.longest_ms.max(milliseconds(took));
    }

    fn cut(&self, place: usize, error: &anyhow::Error) {
        let held = &mut self.report().held[place];
        held.cut_ms = Some(now());
        held.error = Some(format!("{error:#}"));
    }

    fn failed(&self, target: &Target, start: Instant, error: &anyhow::Error) {
        let after_ms = milliseconds(start.elapsed());
        let mut report = self.report();
        report.attempts += 1;
        report.fail(Failure {
            to: target.address,
            started_ms: now().saturating_sub(after_ms),
            after_ms,
            error: format!("{error:#}"),
        });
    }
}

/// The time, in milliseconds since 1970.
fn now() -> u64 {
    // A clock before 1970 is none.
    milliseconds(
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default(),
    )
}

fn milliseconds(duration: Duration) -> u64 {
    duration.as_millis() as u64
}
