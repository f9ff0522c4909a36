//! The running hub: everything put together, and taken apart again in order.

use std::fs::{File, TryLockError};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cortex_proto::v1::enroll_server::EnrollServer;
use cortex_proto::v1::node_server::NodeServer;
use cortex_proto::v1::operator_server::OperatorServer;
use cortex_proto::v1::{Drain, hub_frame};
use cortex_proto::{
    BULK_CONNECTION_WINDOW, BULK_STREAM_WINDOW, HTTP2_FRAME_BYTES, MAX_MESSAGE_BYTES,
};
use cortex_shared::clock::unix_ms;
use cortex_shared::durable;
use cortex_shared::peer::CaPin;
use cortex_shared::tasks::TaskScope;
use rustls_pki_types::CertificateDer;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::Server;

use crate::authority::audit::{AuditError, AuditLog};
use crate::authority::nodes::NodeDecisions;
use crate::authority::operators::Operators;
use crate::authority::refused::RefusalLog;
use crate::authority::sessions::Sessions;
use crate::config::{DataLayout, HubConfig};
use crate::enroll::authorities::{Authorities, RotationError};
use crate::enroll::ca::CaError;
use crate::enroll::hub_certificate::HubCertificate;
use crate::enroll::limits::JoinLimits;
use crate::enroll::validator::{Admitted, Validator};
use crate::events::{EventBus, EventFeed, Kind, Knowledge, NewEvent};
use crate::grpc::accept::{self, Incoming};
use crate::grpc::auth::AuthLayer;
use crate::grpc::enroll::EnrollService;
use crate::grpc::guests::{Bounded, Guests};
use crate::grpc::handshakes::Handshakes;
use crate::grpc::node::NodeService;
use crate::grpc::operator::{HubAddress, OperatorService};
use crate::grpc::receiving::ReceivingLayer;
use crate::grpc::sync::SyncService;
use crate::http::{Ground, HttpError, HttpSide};
use crate::node::files::FileExchange;
use crate::node::membership::Membership;
use crate::node::registry::Registry;
use crate::service::Inherited;
use crate::skills::{SkillError, Skills};
use crate::store::events::EventStore;
use crate::store::history::HistoryStore;
use crate::store::sqlite::SqliteStore;
use crate::store::{Store, StoreError};
use crate::sync::members::Members;
use crate::sync::{SyncError, Workspaces};
use crate::task::history::History;
use crate::task::relay::{Deadlines, Relay};
use crate::task::spool::Spool;
use crate::worker::{self, Supervisor, WorkOf};

/// Streams one connection may have open: a node's running tasks, or an operator's commands.
const STREAMS_PER_CONNECTION: u32 = 4096;
/// The same for a guest, whose business is one call, and what it may send before somebody reads: else what it
/// begins and never ends would be the hub's memory.
const STREAMS_OF_GUEST: u32 = 2;
const GUEST_WINDOW: u32 = 65_535;
/// The first of the nodes told to go away comes back after this time, which the next hub takes to start.
const FIRST_RECONNECT: Duration = Duration::from_millis(200);
/// How long a hub that stops waits for nodes at which commands are just beginning: for a slow sandbox, but not
/// for a node that does not answer.
const BEGINNING_GRACE: Duration = Duration::from_secs(5);
/// How long after the last node was to come back it is still expected: a handshake of a thousand takes
/// some tenths of a second, a slow line some more; and one that tried while the hub was starting waits some
/// seconds before it tries again.
const ARRIVAL_GRACE: Duration = Duration::from_secs(8);

/// Why the hub could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file or folder of the data directory.
    #[error("cannot use {path}")]
    Data {
        /// Which.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another hub runs on this data.
    #[error("another hub is running on {path}")]
    Locked {
        /// Its data directory.
        path: String,
    },
    /// Somebody began to put a backup back here, and did not finish.
    #[error("the restore into {path} did not finish: run cortex-hubd db restore again")]
    RestoreUnfinished {
        /// The data directory.
        path: String,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The store.
    #[error("cannot open the store")]
    Store(#[from] StoreError),
    /// The audit log.
    #[error("cannot open the audit log")]
    Audit(#[from] AuditError),
    /// The certificate authorities.
    #[error("cannot open the certificate authority")]
    Authorities(#[from] RotationError),
    /// The hub's own certificate.
    #[error("cannot make the hub's certificate")]
    Ca(#[from] CaError),
    /// The folder of workspace content.
    #[error("cannot open the workspaces")]
    Sync(#[from] SyncError),
    /// What was begun in the library could not be finished.
    #[error("cannot open the library of skills")]
    Skills(#[from] SkillError),
    /// TLS.
    #[error("cannot set up TLS")]
    Tls(#[from] rustls::Error),
    /// Threads for handshakes.
    #[error("the system gives no thread")]
    Threads(#[source] io::Error),
    /// The HTTP side.
    #[error("the HTTP side cannot be started")]
    Http(#[from] HttpError),
}

/// What is durable about a hub, opened and locked: enough for `init`, and what a running hub
/// stands on.
pub struct HubData {
    layout: DataLayout,
    store: Arc<SqliteStore>,
    /// The databases. Ends after everything that still has something to write.
    databases: TaskScope,
    authorities: Arc<Authorities>,
    /// Held as long as this exists; the kernel releases it when the process dies.
    _lock: File,
}

impl HubData {
    /// Opens or creates the data directory. Idempotent.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn open(config: &HubConfig) -> Result<Self, StartError> {
        let layout = DataLayout::new(&config.data);
        let shown = |path: &std::path::Path| path.display().to_string();
        let data_error = |source| StartError::Data { path: shown(layout.root()), source };
        durable::create_private_folder(layout.root()).map_err(data_error)?;
        let lock = File::create(layout.lock()).map_err(data_error)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => StartError::Locked { path: shown(layout.root()) },
            TryLockError::Error(source) => StartError::Data { path: shown(&layout.lock()), source },
        })?;
        if layout.restoring().exists() {
            return Err(StartError::RestoreUnfinished { path: shown(layout.root()) });
        }
        let databases = TaskScope::new();
        let store = Arc::new(SqliteStore::open(layout.database(), &databases).await?);
        let mesh = store.mesh().await?;
        let life = config.node_certificate_life;
        let authorities = Arc::new(Authorities::open(layout.ca(), mesh, life, &*store).await?);
        Ok(Self { layout, store, databases, authorities, _lock: lock })
    }

    /// The pins of the mesh's authorities, as invites show them.
    #[must_use]
    pub fn pins(&self) -> String {
        self.authorities.pins()
    }

    /// The certificate of the authority that hubs on this data prove themselves by.
    #[must_use]
    pub fn authority_certificate(&self) -> CertificateDer<'static> {
        self.authorities.ring().serving().certificate().clone()
    }

    /// Writes what the databases have accepted, closes them, and gives the data directory free.
    pub async fn close(self) {
        self.databases.cancel();
        self.databases.finish().await;
    }
}

/// A hub that serves. Dropping it without [`Hub::shutdown`] leaves its tasks to the runtime.
pub struct Hub {
    address: SocketAddr,
    pin: CaPin,
    registry: Arc<Registry>,
    relay: Arc<Relay>,
    store: Arc<dyn Store>,
    audit: Arc<AuditLog>,
    events: Arc<EventBus>,
    scope: TaskScope,
    grace: Duration,
    /// Ends last, so that whoever asks how the hub is gets an answer to the end.
    http: Option<HttpSide>,
    reconnect_spread: Duration,
    certificate: Arc<HubCertificate>,
    data: HubData,
}

impl Hub {
    /// Opens the data, listens, and serves.
    ///
    /// # Errors
    /// See [`StartError`]. Nothing is listened on then.
    pub async fn start(config: HubConfig) -> Result<Self, StartError> {
        Self::start_with(config, Inherited::default(), |store| store).await
    }

    /// The same, on whatever `prepare` makes of the store: for tests and benchmarks, which let it fail.
    ///
    /// # Errors
    /// As [`Hub::start`].
    pub async fn start_on(
        config: HubConfig,
        prepare: impl FnOnce(Arc<dyn Store>) -> Arc<dyn Store>,
    ) -> Result<Self, StartError> {
        Self::start_with(config, Inherited::default(), prepare).await
    }

    /// The same, on sockets that listen already, if there are any: the addresses of the configuration are
    /// not used then.
    ///
    /// # Errors
    /// As [`Hub::start`].
    pub async fn start_with(
        config: HubConfig,
        inherited: Inherited,
        prepare: impl FnOnce(Arc<dyn Store>) -> Arc<dyn Store>,
    ) -> Result<Self, StartError> {
        let data = HubData::open(&config).await?;
        let store = prepare(Arc::clone(&data.store) as _);
        let authorities = Arc::clone(&data.authorities);
        let started_at_ms = unix_ms();
        let listen_error = |source| StartError::Listen { address: config.grpc, source };
        let listener = match inherited.grpc {
            Some(listener) => TcpListener::from_std(listener),
            None => TcpListener::bind(config.grpc).await,
        }
        .map_err(listen_error)?;
        let bound = listener.local_addr().map_err(listen_error)?;
        let address = HubAddress { bound, advertise: config.advertise.clone() };
        let sessions = Arc::new(Sessions::new(config.http.session_life));
        let handshakes = Arc::new(Handshakes::start().map_err(StartError::Threads)?);
        let ground = Ground {
            handshakes: &handshakes,
            authorities: &authorities,
            key: &data.layout.http_key(),
            host: &address.host(),
            sessions: &sessions,
        };
        let http = HttpSide::start(&config.http, inherited.http, ground).await?;
        let scope = TaskScope::new();
        let registry = Arc::new(Registry::new(store.nodes().await?));
        let events = EventStore::open(data.layout.events(), &data.databases).await?;
        let events = EventBus::start(events, config.events, &data.databases).await?;
        let membership = Arc::new(Membership::default());
        membership.reload(&*store).await?;
        let content = Arc::new(Workspaces::open(
            &data.layout.workspaces(),
            config.content,
            scope.clone(),
            data.databases.clone(),
        )?);
        let members = Arc::new(Members::new(
            Arc::clone(&membership),
            Arc::clone(&registry),
            Arc::clone(&store),
            Arc::clone(&content),
            Arc::clone(&events),
        ));
        members.finish_deletions().await?;
        let skills = Arc::new(
            Skills::open(
                Arc::clone(&store),
                Arc::clone(&content),
                Arc::clone(&members),
                config.skills_keep_for,
            )
            .await?,
        );
        let tasks = data.layout.tasks();
        let spool = Spool::open(tasks.clone(), config.spool, &data.databases)
            .map_err(|source| StartError::Data { path: tasks.display().to_string(), source })?;
        let deadlines =
            Deadlines { start: config.task_start_deadline, resume: config.resume_grace };
        let history = HistoryStore::open(data.layout.history(), &data.databases).await?;
        let history = History::start(history, config.history, &scope);
        let relay = Relay::new(
            Arc::clone(&store),
            spool,
            history,
            Arc::clone(&events),
            scope.clone(),
            deadlines,
            config.commands,
        );
        relay.recover().await?;
        let told = Arc::clone(&events);
        let operators =
            Operators::load(Arc::clone(&store), Arc::clone(&relay), Arc::clone(&registry), told)
                .await?;
        let decisions = NodeDecisions::new(
            Arc::clone(&registry),
            Arc::clone(&relay),
            Arc::clone(&membership),
            Arc::clone(&store),
            Arc::clone(&events),
        );
        let audit = AuditLog::new(Arc::clone(&store), data.layout.audit_mark());
        audit.begin().await?;
        let limits = Arc::new(JoinLimits::new(config.join_rate, tokio::time::Instant::now()));
        let validator = Arc::new(Validator::new(
            config.join_queue,
            config.join_deadline,
            Arc::clone(&store),
            Arc::clone(&authorities),
            Arc::clone(&limits),
            Admitted {
                registry: Arc::clone(&registry),
                membership: Arc::clone(&membership),
                operators: Arc::clone(&operators),
                events: Arc::clone(&events),
            },
            scope.clone(),
        ));

        let socket = data.layout.socket();
        let local = accept::bind_local(&socket)
            .map_err(|source| StartError::Data { path: socket.display().to_string(), source })?;
        let certificate = Arc::new(HubCertificate::new(Arc::clone(&authorities), unix_ms)?);
        let resolver = Arc::clone(&certificate) as _;
        let tls = accept::TlsSettings::new(Arc::clone(&authorities), resolver, &[b"h2"])?;

        let refusals = RefusalLog::new(Arc::clone(&store), scope.clone());
        let files = Arc::new(FileExchange::default());
        let workers = Supervisor::new(Arc::clone(&events), scope.clone());
        let knowledge =
            Knowledge { registry: Arc::clone(&registry), membership: Arc::clone(&membership) };
        let operator = OperatorService {
            files: Arc::clone(&files),
            refusals: Arc::clone(&refusals),
            store: Arc::clone(&store),
            registry: Arc::clone(&registry),
            relay: Arc::clone(&relay),
            members: Arc::clone(&members),
            content: Arc::clone(&content),
            skills,
            decisions: Arc::clone(&decisions),
            operators: Arc::clone(&operators),
            audit: Arc::clone(&audit),
            authorities: Arc::clone(&authorities),
            workers: Arc::clone(&workers),
            events: EventFeed { bus: Arc::clone(&events), knowledge },
            scope: scope.clone(),
            accept_deadline: config.accept_deadline,
            address,
            http: http.as_ref().map(|http| http.place().clone()),
            sessions,
            started_at_ms,
            arrivals_until: tokio::time::Instant::now()
                + FIRST_RECONNECT
                + config.reconnect_spread
                + ARRIVAL_GRACE,
            drain_wait: config.drain_wait,
            permissive_longest: config.permissive_longest,
        };
        let node = NodeService {
            files,
            registry: Arc::clone(&registry),
            relay: Arc::clone(&relay),
            members: Arc::clone(&members),
            validator: Arc::clone(&validator),
            authorities: Arc::clone(&authorities),
            decisions: Arc::clone(&decisions),
            store: Arc::clone(&store),
            events: Arc::clone(&events),
            scope: scope.clone(),
            heartbeat: config.heartbeat,
        };
        let enroll = EnrollService { validator, limits, authorities: Arc::clone(&authorities) };
        let sync = SyncService::new(
            Arc::clone(&content),
            membership,
            Arc::clone(&registry),
            Arc::clone(&events),
        );
        let by_http = operator.clone();
        let routes = Routes::new(limited(EnrollServer::new(enroll)))
            .add_service(limited_node(NodeServer::new(node)))
            .add_service(limited_operator(OperatorServer::new(operator)))
            .add_service(sync.into_server());

        let mesh = authorities.mesh();
        let auth = AuthLayer {
            registry: Arc::clone(&registry),
            operators: Arc::clone(&operators),
            refusals,
        };
        if let Some(http) = &http {
            http.open(by_http, auth.clone());
        }
        let incoming = accept::accept_tls(listener, handshakes, tls, mesh, &scope);
        let guests = || Guests::new(config.join_deadline, scope.token().clone());
        let receiving = ReceivingLayer::default();
        let layers = || (auth.clone(), receiving.clone());
        serve(incoming, guests(), routes.clone(), layers(), &scope);
        serve(accept::accept_local(local, &scope), guests(), routes, layers(), &scope);
        hint_heads(&content, Arc::clone(&members), &scope);
        let work = WorkOf {
            registry: Arc::clone(&registry),
            store: Arc::clone(&store),
            decisions,
            operators,
            audit: Arc::clone(&audit),
            content,
            members,
            history: Arc::clone(relay.history()),
            events: Arc::clone(&events),
        };
        worker::register(&workers, work, config.workers);
        tracing::info!(address = %bound, %mesh, "hub serves");
        let pin = authorities.pin();
        let (grace, reconnect_spread) = (config.shutdown_grace, config.reconnect_spread);
        Ok(Self {
            address: bound,
            pin,
            registry,
            relay,
            store,
            audit,
            events,
            scope,
            grace,
            http,
            reconnect_spread,
            certificate,
            data,
        })
    }

    /// The address of the gRPC side, with the port that was chosen if none was given.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The HTTP side, if the configuration has one.
    #[must_use]
    pub fn http(&self) -> Option<&HttpSide> {
        self.http.as_ref()
    }

    /// The administration socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.data.layout.socket()
    }

    /// The certificate of the authority by which the hub proves itself now.
    #[must_use]
    pub fn authority_certificate(&self) -> CertificateDer<'static> {
        self.data.authority_certificate()
    }

    /// Makes the hub a new certificate, for the connections that begin from here on.
    ///
    /// # Errors
    /// If signing fails; the old one stays.
    pub fn renew_certificate(&self) -> Result<(), CaError> {
        self.certificate.renew()
    }

    /// The pin of the mesh's authority.
    #[must_use]
    pub fn pin(&self) -> CaPin {
        self.pin
    }

    /// Ends when somebody has asked the hub to drain, and nothing runs any more or the wait is over. Safe
    /// to give up at any time.
    pub async fn drained(&self) {
        self.relay.draining().over(|| self.relay.unfinished()).await;
    }

    /// Stops in order: new commands are refused, nodes are told when to come back, sessions end, calls finish, the databases are
    /// closed. Tasks that run keep running on their nodes, for the next hub to take up; without a resume
    /// grace each gets its verdict here. The work before that and the
    /// closing take no longer than the grace time each; what did not finish in it is said.
    pub async fn shutdown(self) {
        if let Some(http) = &self.http {
            http.readiness().drain();
        }
        self.relay.draining().begin(Duration::ZERO);
        // Nodes leave once they are told; what was begun for them until now is to reach them first.
        if timeout(self.grace, self.relay.draining().settled()).await.is_err() {
            tracing::warn!("a command that was just to begin was not written in time");
        }
        let begun = timeout(self.grace.min(BEGINNING_GRACE), self.relay.begun());
        let (begun, told) = tokio::join!(begun, timeout(self.grace, self.relay.told()));
        if begun.is_err() {
            tracing::warn!("a command that was just to begin did not in time");
        }
        if told.is_err() {
            tracing::warn!("how a command ended was not written in time");
        }
        let sessions = self.registry.sessions();
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let (first, spread) = (ms(FIRST_RECONNECT), ms(self.reconnect_spread));
        for (index, session) in (0_u64..).zip(&sessions) {
            let reconnect_after_ms = first + index * spread / sessions.len().max(1) as u64;
            // One that is gone needs no telling.
            session.send(hub_frame::Frame::Drain(Drain { reconnect_after_ms })).ok();
        }
        self.events.publish(Kind::HubStopping, NewEvent::of_hub());
        self.scope.cancel();
        if timeout(self.grace, self.scope.finish()).await.is_err() {
            tracing::warn!(tasks = self.scope.running(), "not everything finished in time");
        }
        // Only now: the verdicts of the tasks above are the last that the journal has to accept.
        let closing = async {
            let unsaved = self.registry.take_unsaved();
            if let Err(error) = self.store.touch_nodes(unsaved).await {
                tracing::warn!(%error, "last-seen times not written");
            }
            if let Err(error) = self.audit.move_mark().await {
                tracing::warn!(%error, "the mark of the audit log was not moved");
            }
            if let Err(error) = self.events.finish().await {
                tracing::warn!(%error, "the last events were not written");
            }
            self.data.close().await;
        };
        if timeout(self.grace, closing).await.is_err() {
            // What was acknowledged is in the log, which the next start folds.
            tracing::warn!("the databases did not close in time");
        }
        if let Some(http) = self.http {
            http.shutdown(self.grace).await;
        }
        tracing::info!("hub stopped");
    }
}

fn limited(server: EnrollServer<EnrollService>) -> EnrollServer<EnrollService> {
    // Callers without a certificate: nothing they send is large.
    server.max_decoding_message_size(64 * 1024)
}

fn limited_node(server: NodeServer<NodeService>) -> NodeServer<NodeService> {
    server.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES)
}

fn limited_operator(server: OperatorServer<OperatorService>) -> OperatorServer<OperatorService> {
    server.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES)
}

fn serve(
    mut incoming: Incoming,
    guests: Guests,
    routes: Routes,
    (auth, receiving): (AuthLayer, ReceivingLayer),
    scope: &TaskScope,
) {
    let (to_guests, for_guests) = mpsc::channel(1);
    let (to_known, for_known) = mpsc::channel(1);
    scope.spawn("guests apart", async move {
        while let Some(accepted) = incoming.recv().await {
            let Some(accepted) = accepted.map(|stream| guests.let_in(stream)).transpose() else {
                continue;
            };
            let is_guest = accepted.as_ref().is_ok_and(Bounded::is_guest);
            let sent = if is_guest { to_guests.send(accepted) } else { to_known.send(accepted) };
            if sent.await.is_err() {
                return;
            }
        }
    });
    let of_guests = Server::builder()
        .initial_stream_window_size(GUEST_WINDOW)
        .initial_connection_window_size(GUEST_WINDOW)
        .max_concurrent_streams(STREAMS_OF_GUEST);
    let of_known = Server::builder()
        .initial_stream_window_size(BULK_STREAM_WINDOW)
        .initial_connection_window_size(BULK_CONNECTION_WINDOW)
        .max_concurrent_streams(STREAMS_PER_CONNECTION);
    for (server, incoming) in [(of_guests, for_guests), (of_known, for_known)] {
        let stop = scope.token().clone().cancelled_owned();
        let server = server
            .max_frame_size(HTTP2_FRAME_BYTES)
            .http2_keepalive_interval(Some(Duration::from_secs(20)))
            // A ping waits behind what the kernel has taken for a slow line. Dead sessions are found by
            // their heartbeats.
            .http2_keepalive_timeout(Some(Duration::from_secs(60)))
            .layer(auth.clone())
            .layer(receiving.clone())
            .add_routes(routes.clone())
            .serve_with_incoming_shutdown(ReceiverStream::new(incoming), stop);
        scope.spawn("server", async move {
            if let Err(error) = server.await {
                tracing::error!(%error, "server ended");
            }
        });
    }
}

/// Hints at newer versions to the members that are connected.
fn hint_heads(content: &Workspaces, members: Arc<Members>, scope: &TaskScope) {
    let mut heads = content.moved();
    let cancel = scope.token().clone();
    scope.spawn("head hints", async move {
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                moved = heads.next() => {
                    let Some(moved) = moved else { return };
                    for (workspace, head) in moved {
                        members.head_moved(workspace, head.seq);
                    }
                }
            }
        }
    });
}

#[cfg(test)]
mod tests;
