//! Commands of a node that is without a hub.
//!
//! They go on: a network that is gone for an hour must not cost an hour's work. But nobody can tell the
//! node any more that it or their caller was put out of the mesh. So they end when the node's
//! certificate does, by which the mesh answers for it, or earlier if the node's owner wants that
//! (`commands.cut_off_limit_s` in `agent.json`). What runs starts again to count with each session.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::dispatch::Dispatcher;
use super::session::LinkState;
use crate::exec::CancelCause;
use crate::identity::live::LiveIdentity;

/// Longest wait before the clocks are looked at again: one of them may be set.
const LOOK: Duration = Duration::from_secs(60);

/// Ends commands that have been without a hub for too long, until `stop`.
pub async fn watch(
    identity: LiveIdentity,
    dispatcher: Dispatcher,
    limit: Option<Duration>,
    mut link: watch::Receiver<LinkState>,
    stop: CancellationToken,
) {
    let watching = async {
        // The sender lives as long as the daemon.
        while link.wait_for(|state| state.session.is_none()).await.is_ok() {
            let lost = Instant::now();
            let mut ended = false;
            loop {
                let not_after_ms = identity.snapshot().credentials.not_after_ms();
                let certificate_ms = not_after_ms.saturating_sub(identity.hub_now_ms());
                let left = time_left(certificate_ms, limit, lost.elapsed());
                if left.is_zero() && !ended {
                    if dispatcher.running_tasks() > 0 {
                        tracing::warn!("without a hub for too long: the commands here are ended");
                    }
                    dispatcher.end_commands(CancelCause::CutOff);
                    ended = true;
                }
                let wait = if ended { LOOK } else { left.min(LOOK) };
                tokio::select! {
                    _ = link.wait_for(|state| state.session.is_some()) => break,
                    () = tokio::time::sleep(wait) => {}
                }
            }
        }
    };
    stop.run_until_cancelled(watching).await;
}

/// How much longer commands may go on: with a certificate that is good for so many milliseconds yet, and
/// so long after the end of the last session.
fn time_left(certificate_ms: i64, limit: Option<Duration>, without: Duration) -> Duration {
    let certificate = Duration::from_millis(u64::try_from(certificate_ms).unwrap_or(0));
    match limit {
        Some(limit) => certificate.min(limit.saturating_sub(without)),
        None => certificate,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_end_with_the_certificate_or_at_the_owners_limit_whichever_comes_first() {
        let seconds = Duration::from_secs;
        for (certificate_ms, limit, without, left) in [
            (60_000, None, seconds(1000), seconds(60)),
            (60_000, Some(seconds(30)), seconds(10), seconds(20)),
            (60_000, Some(seconds(300)), seconds(10), seconds(60)),
            (60_000, Some(seconds(30)), seconds(31), Duration::ZERO),
            (-5, None, Duration::ZERO, Duration::ZERO),
        ] {
            assert_eq!(time_left(certificate_ms, limit, without), left);
        }
    }
}
