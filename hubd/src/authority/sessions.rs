//! Logins of browsers and of programs that speak HTTP: a code from somebody who has proved to be an
//! operator, which opens one session.
//!
//! Codes and sessions are secrets of 256 random bits, of which only a SHA-256 is kept, in memory: a
//! restart of the hub ends every session, and a core image or a backup holds none. A session says who its
//! holder is and nothing of what that may do: each call is judged anew, by the same table and the same
//! records as those of certificates, so that a revoked operator's session is worth nothing at once.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::TryRng as _;
use sha2::Digest as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroize as _;

use crate::rate::{Bucket, Rate};
use crate::store::KeyHash;

/// How long a code is good for: time to follow a link, and no more.
pub const CODE_LIFE: Duration = Duration::from_secs(5 * 60);
/// A session that nobody uses ends after this time.
pub const IDLE: Duration = Duration::from_secs(60 * 60);
/// Codes, and sessions, of one operator. Beyond them, its oldest ends.
const MAX_OF_ONE: usize = 16;
/// Codes and sessions of everybody. Beyond them, none are given out.
const MAX_ALL: usize = 4096;
/// How often one operator gets a code: each is a line of the audit log, and one that asks in a loop must
/// not fill it.
const OFFERS: Rate = Rate { burst: 64, per_second: 0.1 };
const SECRET_BYTES: usize = 32;
const CODE_PREFIX: &str = "cxl_";
const SESSION_PREFIX: &str = "cxs_";

/// Who a session speaks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionHolder {
    /// An operator, by the login that it had when it asked for the session: a newer login replaces both.
    Operator {
        /// Its name.
        name: String,
        /// The key of its certificate.
        key: KeyHash,
        /// End of its certificate's life, milliseconds since the Unix epoch.
        not_after_ms: i64,
    },
    /// Root, or the hub's user, on the hub's machine.
    Local {
        /// Its number.
        uid: u32,
    },
}

impl SessionHolder {
    /// What it is called: an operator's name, or `local`.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Operator { name, .. } => name,
            Self::Local { .. } => "local",
        }
    }
}

/// A secret that is shown once.
pub struct SessionSecret(String);

impl SessionSecret {
    /// The secret: for whoever is to have it, and nobody else.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for SessionSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SessionSecret")
    }
}

impl Drop for SessionSecret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// There are too many codes or sessions already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many logins are open")]
pub struct TooMany;

/// Why somebody gets no code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OfferRefusal {
    /// Everybody together has too many.
    #[error(transparent)]
    TooMany(#[from] TooMany),
    /// This one asks too often.
    #[error("too many logins were asked for")]
    TooOften {
        /// When it may again.
        wait: Duration,
    },
}

type Hash = [u8; 32];

struct Code {
    holder: SessionHolder,
    begun: Instant,
    until: Instant,
}

struct Session {
    holder: SessionHolder,
    begun: Instant,
    until: Instant,
    used: Instant,
    ended: CancellationToken,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.ended.cancel();
    }
}

/// An open session, as it was found.
#[derive(Clone, Debug)]
pub struct FoundSession {
    /// Whom it speaks for.
    pub holder: SessionHolder,
    /// When it ends at the latest.
    pub until: Instant,
    ended: CancellationToken,
}

impl FoundSession {
    /// Waits until it has ended: closed, or over.
    pub async fn ended(&self) {
        tokio::select! {
            () = self.ended.cancelled() => {}
            () = tokio::time::sleep_until(self.until) => {}
        }
    }
}

impl Session {
    fn is_over(&self, now: Instant) -> bool {
        now >= self.until || now >= self.used + IDLE
    }
}

/// Makes room for one more of somebody, by what says when one of its own has begun: of so many as it may
/// have, the oldest goes.
fn make_room<T>(all: &mut HashMap<Hash, T>, begun: impl Fn(&T) -> Option<Instant>) {
    let own = all.iter().filter_map(|(hash, one)| Some((begun(one)?, *hash)));
    let own: Vec<_> = own.collect();
    if own.len() >= MAX_OF_ONE
        && let Some((_, oldest)) = own.iter().min()
    {
        all.remove(oldest);
    }
}

#[derive(Default)]
struct Memory {
    codes: HashMap<Hash, Code>,
    sessions: HashMap<Hash, Session>,
    /// See [`OFFERS`]: by name, of those who have asked of late.
    offers: HashMap<String, Bucket>,
}

impl Memory {
    fn forget_what_is_over(&mut self, now: Instant) {
        self.codes.retain(|_, code| now < code.until);
        self.sessions.retain(|_, session| !session.is_over(now));
        self.offers.retain(|_, bucket| !bucket.is_full(OFFERS, now));
    }
}

/// See the module.
pub struct Sessions {
    memory: Mutex<Memory>,
    life: Duration,
}

impl Sessions {
    /// Sessions that last no longer than `life`.
    #[must_use]
    pub fn new(life: Duration) -> Self {
        Self { memory: Mutex::default(), life }
    }

    /// How long a session lasts at most.
    #[must_use]
    pub fn life(&self) -> Duration {
        self.life
    }

    /// Held for map operations only.
    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A code that opens one session of this holder, for [`CODE_LIFE`]. Beyond so many of one holder, its
    /// oldest is good no longer: whoever asks for many keeps nobody else from logging in.
    ///
    /// # Errors
    /// See [`OfferRefusal`].
    pub fn offer(
        &self,
        holder: SessionHolder,
        now: Instant,
    ) -> Result<SessionSecret, OfferRefusal> {
        let mut memory = self.lock();
        memory.forget_what_is_over(now);
        let fresh = || Bucket::full(OFFERS, now);
        let offers = memory.offers.entry(holder.name().to_owned()).or_insert_with(fresh);
        offers.take(OFFERS, now).map_err(|wait| OfferRefusal::TooOften { wait })?;
        make_room(&mut memory.codes, |one| {
            (one.holder.name() == holder.name()).then_some(one.begun)
        });
        if memory.codes.len() >= MAX_ALL {
            return Err(TooMany.into());
        }
        let (secret, hash) = secret(CODE_PREFIX);
        memory.codes.insert(hash, Code { holder, begun: now, until: now + CODE_LIFE });
        Ok(secret)
    }

    /// Who a code is for, if it is good. It is used up by that.
    #[must_use]
    pub fn take_code(&self, code: &str, now: Instant) -> Option<SessionHolder> {
        let hash = hash_of(code, CODE_PREFIX)?;
        let code = self.lock().codes.remove(&hash)?;
        (now < code.until).then_some(code.holder)
    }

    /// Opens a session. Beyond so many of one holder, its oldest ends.
    ///
    /// # Errors
    /// [`TooMany`] of everybody.
    pub fn open(&self, holder: SessionHolder, now: Instant) -> Result<SessionSecret, TooMany> {
        let mut memory = self.lock();
        memory.forget_what_is_over(now);
        make_room(&mut memory.sessions, |one| {
            (one.holder.name() == holder.name()).then_some(one.begun)
        });
        if memory.sessions.len() >= MAX_ALL {
            return Err(TooMany);
        }
        let (secret, hash) = secret(SESSION_PREFIX);
        let ended = CancellationToken::new();
        let session = Session { holder, begun: now, until: now + self.life, used: now, ended };
        memory.sessions.insert(hash, session);
        Ok(secret)
    }

    /// An open session. Finding it is using it.
    #[must_use]
    pub fn find(&self, session: &str, now: Instant) -> Option<FoundSession> {
        let hash = hash_of(session, SESSION_PREFIX)?;
        let mut memory = self.lock();
        let session = memory.sessions.get_mut(&hash)?;
        if session.is_over(now) {
            memory.sessions.remove(&hash);
            return None;
        }
        session.used = now;
        Some(FoundSession {
            holder: session.holder.clone(),
            until: session.until,
            ended: session.ended.clone(),
        })
    }

    /// Ends a session; whether there was one.
    pub fn close(&self, session: &str) -> bool {
        hash_of(session, SESSION_PREFIX)
            .is_some_and(|hash| self.lock().sessions.remove(&hash).is_some())
    }

    /// Ends everything of one holder, whose login no longer counts.
    pub fn close_all_of(&self, holder: &SessionHolder) {
        let mut memory = self.lock();
        memory.codes.retain(|_, code| code.holder != *holder);
        memory.sessions.retain(|_, session| session.holder != *holder);
    }

    /// How many sessions are open.
    #[must_use]
    pub fn count(&self, now: Instant) -> usize {
        self.lock().sessions.values().filter(|session| !session.is_over(now)).count()
    }
}

fn secret(prefix: &str) -> (SessionSecret, Hash) {
    let mut bytes = [0; SECRET_BYTES];
    rand::rngs::SysRng.try_fill_bytes(&mut bytes).expect("the operating system gives random bytes");
    let secret = SessionSecret(format!("{prefix}{}", URL_SAFE_NO_PAD.encode(bytes)));
    let hash = sha2::Sha256::digest(bytes).into();
    bytes.zeroize();
    (secret, hash)
}

fn hash_of(text: &str, prefix: &str) -> Option<Hash> {
    let encoded = text.strip_prefix(prefix).filter(|rest| rest.len() == 43)?;
    let mut bytes = URL_SAFE_NO_PAD.decode(encoded).ok()?;
    let hash = sha2::Sha256::digest(&bytes).into();
    bytes.zeroize();
    Some(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ann() -> SessionHolder {
        SessionHolder::Operator { name: "ann".into(), key: [1; 32], not_after_ms: i64::MAX }
    }

    const LIFE: Duration = Duration::from_secs(8 * 3600);

    #[test]
    fn a_code_opens_one_session_and_only_in_time() {
        let (sessions, now) = (Sessions::new(LIFE), Instant::now());
        let code = sessions.offer(ann(), now).unwrap();
        assert!(sessions.find(code.expose(), now).is_none(), "a code is no session");
        assert_eq!(sessions.take_code(code.expose(), now), Some(ann()));
        assert_eq!(sessions.take_code(code.expose(), now), None, "it is used up");
        let late = sessions.offer(ann(), now).unwrap();
        assert_eq!(sessions.take_code(late.expose(), now + CODE_LIFE), None);
        for bad in ["", "cxl_", "cxl_x", &"x".repeat(100_000), &late.expose()[4..]] {
            assert_eq!(sessions.take_code(bad, now), None);
        }
    }

    #[test]
    fn a_session_ends_when_it_is_idle_or_old_or_closed() {
        let begun = Instant::now();
        let (sessions, mut now) = (Sessions::new(LIFE), begun);
        let idle = sessions.open(ann(), now).unwrap();
        let used = sessions.open(ann(), now).unwrap();
        for _ in 0..16 {
            assert!(sessions.find(used.expose(), now).is_some());
            now += IDLE / 2;
            if now >= begun + IDLE {
                assert!(sessions.find(idle.expose(), now).is_none());
            }
        }
        assert!(sessions.find(used.expose(), now).is_none(), "eight hours after it began");
        let closed = sessions.open(ann(), now).unwrap();
        assert!(sessions.close(closed.expose()) && !sessions.close(closed.expose()));
        assert!(sessions.find(closed.expose(), now).is_none());
        assert_eq!(sessions.count(now), 0);
    }

    #[test]
    fn one_operator_has_so_many_sessions_and_the_oldest_goes() {
        let (sessions, mut now) = (Sessions::new(LIFE), Instant::now());
        let of_bob = sessions.open(SessionHolder::Local { uid: 0 }, now).unwrap();
        let mut all = Vec::new();
        for _ in 0..=MAX_OF_ONE {
            all.push(sessions.open(ann(), now).unwrap());
            now += Duration::from_secs(1);
        }
        assert!(sessions.find(all[0].expose(), now).is_none());
        assert!(all[1..].iter().all(|session| sessions.find(session.expose(), now).is_some()));
        assert!(sessions.find(of_bob.expose(), now).is_some());
        sessions.close_all_of(&ann());
        assert_eq!(sessions.count(now), 1);
    }

    #[test]
    fn one_operator_has_so_many_codes_and_keeps_nobody_else_from_logging_in() {
        let (sessions, mut now) = (Sessions::new(LIFE), Instant::now());
        let of_root = sessions.offer(SessionHolder::Local { uid: 0 }, now).unwrap();
        let mut all = Vec::new();
        for _ in 0..=MAX_OF_ONE {
            now += Duration::from_millis(1);
            all.push(sessions.offer(ann(), now).unwrap());
        }
        assert_eq!(sessions.take_code(all[0].expose(), now), None, "the oldest went");
        assert!(all[1..].iter().all(|c| sessions.take_code(c.expose(), now).is_some()));
        // However often it asks, its share stays the same, and after a while it has to wait.
        let refused = (0..MAX_ALL).find_map(|_| sessions.offer(ann(), now).err()).unwrap();
        assert!(matches!(refused, OfferRefusal::TooOften { wait } if wait.as_secs() >= 9));
        assert_eq!(sessions.lock().codes.len(), MAX_OF_ONE + 1);
        assert!(sessions.take_code(of_root.expose(), now).is_some());
        assert!(sessions.offer(SessionHolder::Local { uid: 0 }, now).is_ok());
        now += Duration::from_secs(10);
        assert!(sessions.offer(ann(), now).is_ok());
        assert!(sessions.offer(ann(), now).is_err());
    }

    #[test]
    fn secrets_are_not_printed() {
        let (secret, _) = secret(CODE_PREFIX);
        assert!(!format!("{secret:?}").contains(CODE_PREFIX));
    }
}
