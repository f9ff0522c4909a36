//! Going on where the connection to the hub broke: what follows something survives a restart of the hub.
//!
//! A hub that has started anew takes every node for offline until it is back, so what it says of who is online
//! counts only after a while: [`Latest::settles_at`].

use std::time::Duration;

use cortex_proto::CODE_TRAILER;
use rand::RngExt as _;
use tokio::time::Instant;
use tonic::{Code, Response, Status, Streaming};

use super::error::CliError;
use super::printer::{ColorWhen, complain};
use crate::client::{certificate_refusal, connect_error_in};

/// How long a hub that went away is tried again: longer than a restart takes.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Between two attempts, at first and at most.
pub(super) const DELAYS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Whether trying again may help: the connection broke, or the hub or its store are in trouble.
pub(super) fn is_passing(status: &Status) -> bool {
    if certificate_refusal(status).is_some() {
        return false;
    }
    if let Some(error) = connect_error_in(status) {
        return !error.is_permanent();
    }
    match status.code() {
        Code::Unavailable | Code::Internal | Code::ResourceExhausted | Code::DeadlineExceeded => {
            true
        }
        // Of a connection; the hub's own refusals name their reason.
        Code::Unknown | Code::Cancelled | Code::Aborted => {
            !status.metadata().contains_key(CODE_TRAILER)
        }
        _ => false,
    }
}

/// How long to wait before the next attempt, which is the later the longer it has been tried, and not
/// before the hub wants it.
pub(super) fn next_delay(status: &Status, last: Option<Duration>) -> Duration {
    let delay = last.map_or(DELAYS.0, |last| (last * 2).min(DELAYS.1));
    let asked = cortex_proto::retry_after(status.metadata()).unwrap_or_default();
    delay.max(asked.min(PATIENCE))
}

/// With some chance in it, so that not all who lost the same hub come back at the same moment.
pub(super) fn jittered(delay: Duration) -> Duration {
    delay.mul_f64(rand::rng().random_range(0.5..1.0))
}

/// One thing that goes on over broken connections.
#[derive(Debug, Default)]
pub(super) struct Persistence {
    /// The hub has answered: from then on it is worth trying.
    known: bool,
    lost_at: Option<Instant>,
    delay: Option<Duration>,
}

impl Persistence {
    /// Something came from the hub.
    pub(super) fn arrived(&mut self) {
        self.known = true;
        if self.lost_at.take().is_some() {
            self.delay = None;
            complain("note: connected to the hub again\n", ColorWhen::Auto);
        }
    }

    /// Waits until it may be tried again.
    ///
    /// # Errors
    /// What broke it, if trying again is of no use, or has been for too long.
    pub(super) async fn pause(&mut self, status: Status) -> Result<(), CliError> {
        let lost_at = *self.lost_at.get_or_insert_with(Instant::now);
        if !self.known || !is_passing(&status) || lost_at.elapsed() > PATIENCE {
            return Err(status.into());
        }
        if self.delay.is_none() {
            complain("note: the connection to the hub was lost; reconnecting\n", ColorWhen::Auto);
        }
        let delay = next_delay(&status, self.delay);
        self.delay = Some(delay);
        tokio::time::sleep(jittered(delay)).await;
        Ok(())
    }
}

/// A stream of the latest state, which is asked for anew where it broke or ended: the hub ends none by itself.
#[derive(Debug)]
pub(super) struct Latest<T> {
    open: Option<Streaming<T>>,
    /// Why it is not open any more.
    broke: Option<Status>,
    persistence: Persistence,
    settles_at: Option<Instant>,
}

impl<T> Latest<T> {
    pub(super) fn new() -> Self {
        Self { open: None, broke: None, persistence: Persistence::default(), settles_at: None }
    }

    /// What comes next; nothing where the stream broke, which the next call asks for anew.
    ///
    /// # Errors
    /// If that is of no use, or has been for too long.
    pub(super) async fn next(
        &mut self,
        ask: impl AsyncFnOnce() -> Result<Response<Streaming<T>>, Status>,
    ) -> Result<Option<T>, CliError> {
        if let Some(status) = self.broke.take() {
            self.persistence.pause(status).await?;
        }
        match self.message(ask).await {
            Ok(message) => Ok(Some(message)),
            Err(status) => {
                (self.open, self.broke) = (None, Some(status));
                Ok(None)
            }
        }
    }

    async fn message(
        &mut self,
        ask: impl AsyncFnOnce() -> Result<Response<Streaming<T>>, Status>,
    ) -> Result<T, Status> {
        let open = match &mut self.open {
            Some(open) => open,
            None => {
                let answer = ask().await?.into_inner();
                self.settles_at = self.persistence.lost_at.map(|_| Instant::now() + PATIENCE);
                self.persistence.known = true;
                self.open.insert(answer)
            }
        };
        let message = open.message().await?;
        // An older hub that stops says nothing.
        let message = message.ok_or_else(|| Status::unavailable("the hub ended the stream"))?;
        // Only now: one that fails each time is not asked for ever.
        self.persistence.arrived();
        Ok(message)
    }

    /// Until when nodes may still come back to a hub that was lost and is there again.
    pub(super) fn settles_at(&self) -> Option<Instant> {
        self.settles_at.filter(|at| *at > Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_that_may_pass_is_told_from_refusals() {
        for (code, passing) in [
            (Code::Unavailable, true),
            (Code::Internal, true),
            (Code::ResourceExhausted, true),
            (Code::Unknown, true),
            (Code::NotFound, false),
            (Code::PermissionDenied, false),
            (Code::Unauthenticated, false),
            (Code::FailedPrecondition, false),
            (Code::InvalidArgument, false),
        ] {
            assert_eq!(is_passing(&Status::new(code, "")), passing, "{code:?}");
        }
    }

    #[tokio::test]
    async fn a_hub_that_never_answered_is_not_waited_for_and_a_refusal_is_none_that_passes() {
        let gone = || Status::unavailable("gone");
        assert!(Persistence::default().pause(gone()).await.is_err());
        let mut persistence = Persistence::default();
        persistence.arrived();
        assert!(persistence.pause(gone()).await.is_ok());
        assert!(persistence.pause(Status::not_found("")).await.is_err());
        persistence.lost_at = Some(Instant::now() - PATIENCE - DELAYS.1);
        assert!(persistence.pause(gone()).await.is_err(), "not for ever");
    }

    #[test]
    fn attempts_become_fewer_and_heed_what_the_hub_asks_for() {
        let gone = Status::unavailable("");
        let delays = std::iter::successors(Some(next_delay(&gone, None)), |last| {
            Some(next_delay(&gone, Some(*last)))
        });
        let delays: Vec<_> = delays.take(8).collect();
        assert_eq!((delays[0], delays[1], delays[7]), (DELAYS.0, DELAYS.0 * 2, DELAYS.1));
        let mut busy = Status::resource_exhausted("");
        busy.metadata_mut().insert(cortex_proto::RETRY_AFTER_TRAILER, "2500".parse().unwrap());
        assert_eq!(next_delay(&busy, None), Duration::from_millis(2500));
    }
}
