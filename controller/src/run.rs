//! Starts the parts, in the order of the drawing in `main.rs`, and ends when one of them does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use kube::Client;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::apply::Applier;
use crate::args::Args;
use crate::authenticate::{Authenticator, Expected};
use crate::ca::roots::RootPublisher;
use crate::ca::secret::{CaSecret, CurrentCa};
use crate::certificates::Certificates;
use crate::dirty_nodes::DirtyNodes;
use crate::discovery::Discovery;
use crate::health::{self, Health, Serving};
use crate::leader::Elector;
use crate::metrics::Metrics;
use crate::model::{self, Model, Published};
use crate::problems::Problems;
use crate::serve::{self, ServingCertificate};
use crate::taint::Tainter;
use crate::watch::watches;

/// Changes that wait to be taken in.
const WAITING_UPDATES: usize = 4096;
/// How long open requests may take once the program was told to end.
const GRACE: Duration = Duration::from_secs(10);

/// Runs until a signal (then `Ok`) or until a part fails.
pub(crate) async fn run(args: Args) -> Result<()> {
    let client = Client::try_default()
        .await
        .context("no way to the API server: neither in a cluster nor a usable KUBECONFIG")?;
    let mut parts = Parts {
        args,
        client,
        problems: Problems::default(),
        metrics: Metrics::default(),
        stop: CancellationToken::new(),
        tasks: JoinSet::new(),
    };
    parts.stop_on_signal()?;
    let stop = parts.stop.clone();
    tokio::select! {
        // First: a start that is broken off looks like one that failed.
        biased;
        () = stop.cancelled() => {}
        started = parts.start() => started?,
    }
    parts.wait().await
}

/// What the parts share, and the parts that run.
struct Parts {
    args: Args,
    client: Client,
    problems: Problems,
    metrics: Metrics,
    stop: CancellationToken,
    tasks: JoinSet<Result<()>>,
}

impl Parts {
    async fn start(&mut self) -> Result<()> {
        let (publish, mut published) = watch::channel(None);
        let serving = Serving::default();
        self.start_health(published.clone(), serving.clone())
            .await?;
        let ca = self.start_ca().await?;
        let dirty = self.start_model(publish);
        let leading = self.start_election();
        self.start_applier(published.clone(), leading.clone(), dirty);
        self.start_root_publisher(ca.clone(), leading);
        // Before that, a client would be told that everything it knows is gone.
        published.wait_for(Option::is_some).await?;
        self.start_server(published, ca).await?;
        serving.set(true);
        Ok(())
    }

    fn stop_on_signal(&mut self) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
        let stop = self.stop.clone();
        self.spawn("signals", async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("told to end");
            stop.cancel();
            Ok(())
        });
        Ok(())
    }

    async fn start_health(&mut self, published: Published, serving: Serving) -> Result<()> {
        let listener = bind(&self.args.health_listen).await?;
        let health = Health {
            problems: self.problems.clone(),
            published,
            serving,
            registry: self.metrics.register(),
        };
        let served = health::serve(listener, health, self.stop.clone());
        self.spawn("health", async { Ok(served.await?) });
        Ok(())
    }

    async fn start_ca(&mut self) -> Result<CurrentCa> {
        let secret = CaSecret::new(
            self.client.clone(),
            (&self.args.namespace, &self.args.ca_secret),
            &self.args.trust_domain,
            self.problems.clone(),
        );
        let ca = secret.load_or_create().await?;
        let (current, receiver) = watch::channel(Arc::new(ca));
        self.spawn_until_stop("the watch of the CA", secret.follow(current));
        Ok(receiver)
    }

    fn start_model(&mut self, publish: watch::Sender<Option<Arc<Model>>>) -> Arc<DirtyNodes> {
        let (updates, received) = mpsc::channel(WAITING_UPDATES);
        let label = &self.args.enrolment_label;
        for watch in watches(&self.client, label, &self.problems, &updates) {
            self.spawn_until_stop("a watch", watch);
        }
        let dirty = Arc::new(DirtyNodes::default());
        let model = model::run(self.args.facts(), received, publish, dirty.clone());
        self.spawn_until_stop("the model", model);
        dirty
    }

    fn start_election(&mut self) -> watch::Receiver<bool> {
        let (leading, receiver) = watch::channel(false);
        let elector = Elector::new(
            self.client.clone(),
            (&self.args.namespace, &self.args.pod_name),
            leading,
            self.problems.clone(),
            self.metrics.clone(),
        );
        let stop = self.stop.clone();
        self.spawn("the election", async {
            elector.run(stop).await;
            Ok(())
        });
        receiver
    }

    fn start_applier(
        &mut self,
        published: Published,
        leading: watch::Receiver<bool>,
        dirty: Arc<DirtyNodes>,
    ) {
        let startup = self.args.startup();
        let applier = Applier::new(
            self.client.clone(),
            startup.map(|startup| Tainter::new(self.client.clone(), startup)),
            (self.args.rules(), self.args.tunnel_type.into()),
            (published, leading, dirty),
            self.problems.clone(),
            self.metrics.clone(),
        );
        self.spawn_until_stop("the writer of AmbientNodes", applier.run());
    }

    fn start_root_publisher(&mut self, ca: CurrentCa, leading: watch::Receiver<bool>) {
        let publisher = RootPublisher::new(
            self.client.clone(),
            (&self.args.namespace, &self.args.root_config_map),
            ca,
            leading,
            self.problems.clone(),
        );
        self.spawn_until_stop("the publisher of roots", publisher.run());
    }

    async fn start_server(&mut self, published: Published, ca: CurrentCa) -> Result<()> {
        let listener = bind(&self.args.listen).await?;
        let first = ca.borrow().clone();
        let (certificate, renew_at) =
            ServingCertificate::new(&first, self.args.server_names(), self.args.certificate_ttl)
                .context("the serving certificate")?;
        let renewal = certificate
            .clone()
            .renew(ca.clone(), renew_at, self.problems.clone());
        self.spawn_until_stop("the renewal of the serving certificate", renewal);
        let authenticator = Arc::new(Authenticator::new(
            self.client.clone(),
            Expected::new(
                &self.args.token_audience,
                &self.args.namespace,
                &self.args.proxy_service_account,
            ),
            self.problems.clone(),
        ));
        let discovery = Discovery::new(
            authenticator.clone(),
            published.clone(),
            self.metrics.clone(),
            self.stop.clone(),
        );
        let certificates = Certificates {
            authenticator,
            published,
            facts: self.args.facts(),
            ca,
            validity: self.args.certificate_ttl,
            metrics: self.metrics.clone(),
        };
        let stop = self.stop.clone();
        let served = serve::serve(listener, certificate, discovery, certificates, stop);
        self.spawn("gRPC", async { Ok(served.await?) });
        Ok(())
    }

    /// A part that ends before the program does has failed.
    fn spawn(
        &mut self,
        name: &'static str,
        part: impl Future<Output = Result<()>> + Send + 'static,
    ) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            part.await.with_context(|| name)?;
            if stop.is_cancelled() {
                return Ok(());
            }
            Err(anyhow!("{name} ended"))
        });
    }

    fn spawn_until_stop(
        &mut self,
        name: &'static str,
        part: impl Future<Output = ()> + Send + 'static,
    ) {
        let stop = self.stop.clone();
        self.spawn(name, async move {
            stop.run_until_cancelled(part).await;
            Ok(())
        });
    }

    /// Until every part has ended; one that fails ends all others.
    async fn wait(mut self) -> Result<()> {
        let mut first_error = Ok(());
        let ended = async {
            while let Some(joined) = self.tasks.join_next().await {
                let result = joined.context("a part panicked").flatten();
                if first_error.is_ok() {
                    first_error = result;
                }
                if first_error.is_err() {
                    self.stop.cancel();
                }
            }
        };
        let stop = self.stop.clone();
        let overdue = async {
            stop.cancelled().await;
            tokio::time::sleep(GRACE).await;
        };
        tokio::select! {
            () = ended => {}
            () = overdue => tracing::warn!("ended with requests still open"),
        }
        first_error
    }
}

async fn bind(addresses: &[SocketAddr]) -> Result<TcpListener> {
    let listener = TcpListener::bind(addresses)
        .await
        .with_context(|| format!("cannot listen on any of {addresses:?}"))?;
    let address = listener.local_addr()?;
    tracing::info!(%address, "listening");
    Ok(listener)
}
