//! The certificate authorities of the mesh: one, or two while one replaces the other.
//!
//! The replacement goes in steps, each of which every member survives without being touched:
//!
//! | step         | signs members | signs the hub | trusted |
//! |--------------|---------------|---------------|---------|
//! | (single)     | old           | old           | old     |
//! | `prepare`    | old           | old           | both    |
//! | `issue`      | new           | old           | both    |
//! | `trust-only` | new           | new           | both    |
//! | `retire`     | new           | new           | new     |
//!
//! A node hears of a new authority when it connects, renews or joins, over a connection that the old
//! one vouches for; this is why the hub goes on proving itself by the old one while nodes move.
//!
//! Keys and certificates are files in `DATA/ca`; which of them count, and as what, is in the store. A
//! crash loses at most a step whose caller was not told that it was done; the files of an authority
//! that the store does not know are never used.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use cortex_shared::clock::unix_ms;
use cortex_shared::durable;
use cortex_shared::ids::MeshId;
use cortex_shared::peer::CaPin;

use super::ca::{CaError, CertificateAuthority, files};
use crate::store::{CaStage, CaState, NewAudit, Node, Store, StoreError};

/// Name of the first authority of every mesh.
const FIRST: &str = "ca";
/// File with the pins that invites show, for `cortex-hubd ca pin`. Written anew at each start.
const PINS: &str = "pins";

/// A step of replacing the authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotationStep {
    /// Make the next authority, and let everyone trust it.
    Prepare,
    /// Sign members with it.
    Issue,
    /// Sign the hub with it, too: the old one signs nothing any more.
    TrustOnly,
    /// Trust the old one no longer.
    Retire,
}

impl RotationStep {
    /// The word on the command line and in the protocol.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Issue => "issue",
            Self::TrustOnly => "trust-only",
            Self::Retire => "retire",
        }
    }

    /// The step that may follow a stage.
    fn after(stage: CaStage) -> Self {
        match stage {
            CaStage::Single => Self::Prepare,
            CaStage::Prepared => Self::Issue,
            CaStage::Issuing => Self::TrustOnly,
            CaStage::TrustOnly => Self::Retire,
        }
    }

    /// The stage that it leads to.
    fn leads_to(self) -> CaStage {
        match self {
            Self::Prepare => CaStage::Prepared,
            Self::Issue => CaStage::Issuing,
            Self::TrustOnly => CaStage::TrustOnly,
            Self::Retire => CaStage::Single,
        }
    }
}

impl FromStr for RotationStep {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Prepare, Self::Issue, Self::TrustOnly, Self::Retire]
            .into_iter()
            .find(|step| step.word() == text)
            .ok_or(())
    }
}

/// Why a step was not taken.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// Another one comes first.
    #[error("the step {wanted} cannot be taken now; the next one is {next}")]
    OutOfOrder {
        /// What was asked for.
        wanted: &'static str,
        /// What can be done.
        next: &'static str,
    },
    /// The authority.
    #[error("the certificate authority failed")]
    Ca(#[from] CaError),
    /// The store.
    #[error("the hub's store failed")]
    Store(#[from] StoreError),
}

/// The authorities at one moment.
pub struct Ring {
    stage: CaStage,
    established: Arc<CertificateAuthority>,
    next: Option<Arc<CertificateAuthority>>,
}

impl Ring {
    fn load(
        folder: &Path,
        mesh: MeshId,
        node_life: Duration,
        state: &CaState,
    ) -> Result<Self, CaError> {
        if state.next.is_none() != (state.stage == CaStage::Single) {
            return Err(CaError::InvalidState { what: "a stage without its second authority" });
        }
        let open = |name: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
            if name.is_empty() || !name.chars().all(plain) {
                return Err(CaError::InvalidState { what: "a name that is no file name" });
            }
            CertificateAuthority::open(folder, name, mesh, node_life, unix_ms()).map(Arc::new)
        };
        let established = open(&state.established)?;
        let next = state.next.as_deref().map(open).transpose()?;
        Ok(Self { stage: state.stage, established, next })
    }

    /// How far the replacement is.
    #[must_use]
    pub fn stage(&self) -> CaStage {
        self.stage
    }

    /// The one that signs members now.
    #[must_use]
    pub fn issuing(&self) -> &Arc<CertificateAuthority> {
        match (self.stage, &self.next) {
            (CaStage::Issuing | CaStage::TrustOnly, Some(next)) => next,
            _ => &self.established,
        }
    }

    /// The one that signs the hub's own certificate now.
    #[must_use]
    pub fn serving(&self) -> &Arc<CertificateAuthority> {
        match (self.stage, &self.next) {
            (CaStage::TrustOnly, Some(next)) => next,
            _ => &self.established,
        }
    }

    /// All whose members are admitted: the serving one first.
    #[must_use]
    pub fn trusted(&self) -> Vec<&Arc<CertificateAuthority>> {
        let mut trusted = vec![&self.established];
        trusted.extend(&self.next);
        if self.stage == CaStage::TrustOnly {
            trusted.reverse();
        }
        trusted
    }

    /// The one besides the issuing one, while there are two.
    #[must_use]
    pub fn other(&self) -> Option<&Arc<CertificateAuthority>> {
        self.trusted().into_iter().find(|ca| ca.pin() != self.issuing().pin())
    }

    /// Whether the node has a certificate of the authority that signs now.
    #[must_use]
    pub fn has_moved(&self, node: &Node) -> bool {
        node.certificate.authority == *self.issuing().pin().as_bytes()
    }

    /// The certificates of all of them.
    #[must_use]
    pub fn trusted_der(&self) -> Vec<Bytes> {
        self.trusted().into_iter().map(|ca| Bytes::copy_from_slice(ca.certificate())).collect()
    }

    /// The pins of all of them as `join --ca` takes them, the serving one first: an invite that is
    /// used a few steps later still leads to this hub.
    #[must_use]
    pub fn pins(&self) -> String {
        let pins: Vec<String> = self.trusted().iter().map(|ca| ca.pin().to_string()).collect();
        pins.join(",")
    }
}

/// See the module.
pub struct Authorities {
    mesh: MeshId,
    folder: PathBuf,
    node_life: Duration,
    ring: RwLock<Arc<Ring>>,
    /// One step at a time; holds what the store says.
    state: tokio::sync::Mutex<CaState>,
}

impl Authorities {
    /// Opens the authorities that the store knows, or makes the first one. The certificates of nodes
    /// live for `node_life`.
    ///
    /// # Errors
    /// If files cannot be read or written, or are damaged; those of the store.
    pub async fn open(
        folder: PathBuf,
        mesh: MeshId,
        node_life: Duration,
        store: &dyn Store,
    ) -> Result<Self, RotationError> {
        let state = match store.ca_state().await? {
            Some(state) => state,
            None => {
                let first =
                    CaState { stage: CaStage::Single, established: FIRST.to_owned(), next: None };
                store.set_ca_state(first.clone(), None).await?;
                first
            }
        };
        let ring = blocking(folder.clone(), mesh, node_life, state.clone()).await?;
        Ok(Self {
            mesh,
            folder,
            node_life,
            ring: RwLock::new(Arc::new(ring)),
            state: tokio::sync::Mutex::new(state),
        })
    }

    /// How long nodes' certificates live.
    #[must_use]
    pub fn node_life(&self) -> Duration {
        self.node_life
    }

    /// The mesh they sign for.
    #[must_use]
    pub fn mesh(&self) -> MeshId {
        self.mesh
    }

    /// The authorities now.
    #[must_use]
    pub fn ring(&self) -> Arc<Ring> {
        Arc::clone(&self.ring.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The pin of the one by which the hub proves itself now.
    #[must_use]
    pub fn pin(&self) -> CaPin {
        self.ring().serving().pin()
    }

    /// The pins that invites show.
    #[must_use]
    pub fn pins(&self) -> String {
        self.ring().pins()
    }

    /// Takes a step; nothing happens if it is the one that was taken last. From the answer on it holds
    /// for every handshake, without a restart. The future must be run to its end: dropped in between,
    /// memory lags behind the store until the next start.
    ///
    /// # Errors
    /// See [`RotationError`]; nothing has changed then.
    pub async fn advance(
        &self,
        step: RotationStep,
        store: &dyn Store,
        audit: NewAudit,
    ) -> Result<(), RotationError> {
        let mut state = self.state.lock().await;
        if state.stage == step.leads_to() {
            return Ok(());
        }
        let possible = RotationStep::after(state.stage);
        if step != possible {
            return Err(RotationError::OutOfOrder { wanted: step.word(), next: possible.word() });
        }
        let changed = match step {
            RotationStep::Prepare => CaState {
                next: Some(format!("ca-{:016x}", rand::random::<u64>())),
                stage: CaStage::Prepared,
                ..state.clone()
            },
            RotationStep::Issue | RotationStep::TrustOnly => {
                CaState { stage: step.leads_to(), ..state.clone() }
            }
            RotationStep::Retire => CaState {
                established: state.next.clone().unwrap_or_else(|| state.established.clone()),
                next: None,
                stage: CaStage::Single,
            },
        };
        // First the files, which nothing knows yet; then the store, which decides; then everyone.
        let (folder, life) = (self.folder.clone(), self.node_life);
        let ring = blocking(folder, self.mesh, life, changed.clone()).await?;
        store.set_ca_state(changed.clone(), Some(audit)).await?;
        let before = std::mem::replace(&mut *state, changed);
        *self.ring.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ring);
        let ring = self.ring();
        tracing::info!(step = step.word(), pin = %ring.issuing().pin(), "certificate authority");
        if state.established != before.established {
            self.remove_files(before.established).await;
        }
        Ok(())
    }

    /// Removes a retired authority. Left over, its key would still be one that some node may trust.
    async fn remove_files(&self, name: String) {
        let (key, certificate) = files(&self.folder, &name);
        let removed = tokio::task::spawn_blocking(move || {
            fs::remove_file(key).and_then(|()| fs::remove_file(certificate))
        });
        if !matches!(removed.await, Ok(Ok(()))) {
            tracing::warn!(name, "the files of a retired authority could not be removed");
        }
    }
}

/// Loads a ring, and writes down its pins.
async fn blocking(
    folder: PathBuf,
    mesh: MeshId,
    node_life: Duration,
    state: CaState,
) -> Result<Ring, CaError> {
    let loading = tokio::task::spawn_blocking(move || {
        let ring = Ring::load(&folder, mesh, node_life, &state)?;
        let path = folder.join(PINS);
        durable::write_file(&path, ring.pins().as_bytes(), 0o644)
            .map_err(|source| CaError::Io { path: path.display().to_string(), source })?;
        Ok(ring)
    });
    loading.await.map_err(|_| CaError::InvalidState { what: "they could not be loaded" })?
}

/// The pins that a hub on this folder shows, whether it runs or not.
///
/// # Errors
/// If there is no authority, or it cannot be read.
pub fn read_pins(folder: &Path) -> std::io::Result<String> {
    fs::read_to_string(folder.join(PINS))
}

#[cfg(test)]
mod tests {
    use cortex_shared::tasks::TaskScope;

    use super::super::ca::NODE_CERTIFICATE_LIFE;
    use super::*;
    use crate::store::sqlite::SqliteStore;

    fn line() -> NewAudit {
        NewAudit {
            at_ms: 1,
            actor: "local".into(),
            action: "ca.rotated",
            target: "ca".into(),
            detail: "{}".into(),
        }
    }

    #[tokio::test]
    async fn the_steps_come_in_order_and_survive_a_restart() {
        use RotationStep::{Issue, Prepare, Retire, TrustOnly};
        let folder = tempfile::tempdir().unwrap();
        let database = folder.path().join("hub.db");
        let store = SqliteStore::open(database, &TaskScope::new()).await.unwrap();
        let mesh = store.mesh().await.unwrap();
        let open =
            || Authorities::open(folder.path().join("ca"), mesh, NODE_CERTIFICATE_LIFE, &store);
        let old = open().await.unwrap().pin();
        for (step, too_early) in
            [(Prepare, Issue), (Issue, TrustOnly), (TrustOnly, Retire), (Retire, TrustOnly)]
        {
            let authorities = open().await.unwrap();
            if step != Retire {
                let refused = authorities.advance(too_early, &store, line()).await;
                assert!(matches!(refused, Err(RotationError::OutOfOrder { .. })), "{too_early:?}");
            }
            authorities.advance(step, &store, line()).await.unwrap();
            // A repetition, as after a lost answer, changes nothing.
            authorities.advance(step, &store, line()).await.unwrap();
            let reopened = open().await.unwrap();
            assert_eq!(reopened.pins(), authorities.pins());
            assert_eq!(read_pins(&folder.path().join("ca")).unwrap(), authorities.pins());
            let ring = reopened.ring();
            let (issuing, serving) = (ring.issuing().pin(), ring.serving().pin());
            assert_eq!(issuing == old, step == Prepare);
            assert_eq!(serving == old, matches!(step, Prepare | Issue));
            assert_eq!(ring.trusted().len(), if step == Retire { 1 } else { 2 });
            assert_eq!(ring.trusted()[0].pin(), serving);
        }
        assert!(!folder.path().join("ca/ca.key").exists(), "the retired key is gone");
        assert_ne!(open().await.unwrap().pin(), old);
    }
}
