//! Where TLS handshakes are worked on: threads of their own, and so many at once.
//!
//! A handshake takes a processor for about a millisecond, and some memory for a moment. Among everything else, an
//! operator's call would stand in line behind all that are ready; and the holes that they leave in their
//! thread's memory would become buffers of connections, of which an idle one uses a small part only, and
//! all of it would be resident (docs/performance.md).

use std::io;
use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::AbortOnDropHandle;

/// Handshakes that are worked on at once.
const TURNS: usize = 32;
/// After this time a handshake is taken to wait for its peer, and another one has its turn. So distant
/// peers do not hold up others: hundreds begin in a second, wherever they are.
const TURN: Duration = Duration::from_millis(100);

/// See the module. One for all listeners of a hub.
pub struct Handshakes {
    /// Always there until it is dropped.
    threads: Option<Runtime>,
    turns: Arc<Semaphore>,
}

impl Handshakes {
    /// Starts half as many threads as there are processors.
    ///
    /// # Errors
    /// If the runtime cannot be made. (One that gets no thread from the system panics, as that of the program.)
    pub fn start() -> io::Result<Self> {
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        // Sockets and clocks stay with the runtime that has accepted them.
        let threads = Builder::new_multi_thread()
            .worker_threads(processors.div_ceil(2))
            .thread_name("handshakes")
            .build()?;
        Ok(Self { threads: Some(threads), turns: Arc::new(Semaphore::new(TURNS)) })
    }

    /// A turn, once there is one.
    pub(super) async fn turn(&self) -> OwnedSemaphorePermit {
        let turn = Arc::clone(&self.turns).acquire_owned().await;
        turn.expect("nobody closes it")
    }

    /// Works on a handshake. Dropped, it ends it; its panic goes on here.
    ///
    /// # Errors
    /// Those of the handshake.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        handshake: impl Future<Output = io::Result<T>> + Send + 'static,
        turn: OwnedSemaphorePermit,
    ) -> io::Result<T> {
        let threads = self.threads.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let handshake = AbortOnDropHandle::new(threads.spawn(handshake));
        in_turn(handshake, turn).await.unwrap_or_else(|error| match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(ended) => Err(ended.into()),
        })
    }
}

impl Drop for Handshakes {
    fn drop(&mut self) {
        if let Some(threads) = self.threads.take() {
            // Nothing is left to wait for, and whoever drops this may not.
            threads.shutdown_background();
        }
    }
}

/// Gives the turn back when the work is done, or has taken so long that it must be waiting for somebody.
async fn in_turn<F: Future>(work: F, turn: OwnedSemaphorePermit) -> F::Output {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        biased;
        done = &mut work => return done,
        () = tokio::time::sleep(TURN) => drop(turn),
    }
    work.await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_peer_that_is_slow_keeps_its_turn_for_a_moment_only() {
        let turns = Arc::new(Semaphore::new(1));
        let turn = || Arc::clone(&turns).try_acquire_owned();
        let (answer, peer) = tokio::sync::oneshot::channel::<()>();
        let slow = in_turn(peer, turn().unwrap());
        let another = async {
            assert!(turn().is_err(), "it is worked on");
            let began = tokio::time::Instant::now();
            let next = turns.acquire().await.unwrap();
            assert!(began.elapsed() >= TURN / 2, "it waits for its peer");
            drop(next);
            answer.send(()).unwrap();
        };
        tokio::join!(slow, another).0.unwrap();
        in_turn(std::future::ready(()), turn().unwrap()).await;
        assert!(turn().is_ok(), "it is done");
    }

    #[tokio::test]
    async fn a_handshake_runs_on_a_thread_of_its_own_and_ends_with_who_waits_for_it() {
        let handshakes = Handshakes::start().unwrap();
        let name = async { Ok(std::thread::current().name().map(str::to_owned)) };
        let turn = handshakes.turn().await;
        assert_eq!(handshakes.run(name, turn).await.unwrap().unwrap(), "handshakes");
        let (held, mut dropped) = tokio::sync::mpsc::channel::<()>(1);
        let endless = async move {
            held.send(()).await.ok();
            std::future::pending::<io::Result<()>>().await
        };
        let turn = handshakes.turn().await;
        let waiting = tokio::time::timeout(TURN, handshakes.run(endless, turn));
        assert!(waiting.await.is_err());
        while dropped.recv().await.is_some() {}
        let turn = handshakes.turn().await;
        let panic = async { panic!("a peer found a fault") };
        let told = tokio::spawn(async move { handshakes.run::<()>(panic, turn).await.ok() }).await;
        assert!(told.unwrap_err().is_panic(), "it is told by whoever waits");
    }
}
