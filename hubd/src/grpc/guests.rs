//! What a connection of the gRPC side may take before it is known to be somebody's, and how it leaves when
//! the hub does.
//!
//! Whoever has finished a handshake without a certificate is a guest: it joins, logs in or gets its
//! certificate back, each of which is one call. So there are so many guests, and so many of one address;
//! one that says nothing is sent away, and so is one that has been here longer than any of those calls.
//! Holders of certificates, and the administration socket, are bound by none of this.
//!
//! The server waits at its end for every connection to agree, which one that has not begun to speak HTTP/2
//! never does: it has a moment to begin, whosever it is. So has a guest to finish its call; it repeats it
//! without harm where that was too short.

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use super::accept::{PeerStream, Stream};
use super::auth::Peer;
use crate::shares::{Place, Shares};

/// Guests at once, of all and of one address, which has a quarter. Twice as many as may wait for the store
/// at the same time (`join_queue`): a site that joins as a whole is told when to come again rather than cut
/// off. One that says nothing costs 23 KiB.
const GUESTS: usize = 8192;
const GUESTS_OF_ADDRESS: usize = GUESTS / 4;
/// How long a guest may say nothing: longer than it takes until it is asked for a sign of life, and answers.
const QUIET: Duration = Duration::from_secs(30);
/// How long a guest may stay beyond the time that its call may wait for an answer.
const BEYOND_CALL: Duration = Duration::from_secs(60);
/// How long a guest may stay when the hub stops, and whoever has not begun to speak.
const LEAVING: Duration = Duration::from_secs(2);
/// Bytes with which every client begins to speak HTTP/2.
const PREFACE: u8 = 24;

/// See the module.
pub(crate) struct Guests {
    places: Arc<Shares>,
    times: Times,
    stop: CancellationToken,
}

/// How long a guest may say nothing, stay at all, and stay when the hub stops.
#[derive(Clone, Copy)]
struct Times {
    quiet: Duration,
    stay: Duration,
    leaving: Duration,
}

impl Guests {
    /// For a server that ends with this token, and a call of a guest that may take so long.
    pub(crate) fn new(call: Duration, stop: CancellationToken) -> Self {
        let places = Shares::new(GUESTS, GUESTS_OF_ADDRESS);
        let times = Times { quiet: QUIET, stay: call + BEYOND_CALL, leaving: LEAVING };
        Self { places, times, stop }
    }

    /// The connection within its bounds; `None` for a guest for whom there is no place.
    pub(crate) fn let_in(&self, PeerStream { stream, peer }: PeerStream) -> Option<Bounded> {
        let stop = || Box::pin(self.stop.clone().cancelled_owned());
        let guest = match &peer {
            Peer::Anonymous(address) => Some(Box::new(self.guest(address.ip(), stop())?)),
            Peer::Certified { .. } | Peer::Local { .. } | Peer::Session { .. } => None,
        };
        let end = End::Stop(stop(), self.times.leaving);
        let unheard = Some(Unheard { read: 0, end });
        Some(Bounded { stream, peer, unheard, guest })
    }

    fn guest(&self, address: IpAddr, stop: Stop) -> Option<Guest> {
        let Some(place) = self.places.take(address) else {
            tracing::debug!(%address, "no place for one more without a certificate");
            return None;
        };
        let now = Instant::now();
        let times = self.times;
        let (quiet_until, until) = (now + times.quiet, now + times.stay);
        let timer = Box::pin(sleep_until(quiet_until.min(until)));
        Some(Guest { times, quiet_until, until, timer, stop: Some(stop), _place: place })
    }
}

type Stop = Pin<Box<WaitForCancellationFutureOwned>>;

/// A connection that has not begun to speak HTTP/2.
struct Unheard {
    read: u8,
    end: End,
}

/// A moment after the stop of the hub: whoever has just shaken hands is about to speak, and is to hear that
/// the hub goes. Cut off instead, it would not know with whom it shook hands.
enum End {
    Stop(Stop, Duration),
    Moment(Pin<Box<Sleep>>),
}

impl Unheard {
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let End::Stop(stop, moment) = &mut self.end {
            ready!(stop.as_mut().poll(context));
            self.end = End::Moment(Box::pin(sleep_until(Instant::now() + *moment)));
        }
        match &mut self.end {
            End::Moment(moment) => moment.as_mut().poll(context),
            End::Stop(..) => Poll::Pending,
        }
    }
}

struct Guest {
    times: Times,
    /// When it has said nothing for too long.
    quiet_until: Instant,
    /// When it goes, whatever it says.
    until: Instant,
    timer: Pin<Box<Sleep>>,
    /// Until the hub stops.
    stop: Option<Stop>,
    _place: Place,
}

impl Guest {
    fn poll_end(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        if let Some(stop) = &mut self.stop
            && stop.as_mut().poll(context).is_ready()
        {
            self.stop = None;
            self.until = self.until.min(Instant::now() + self.times.leaving);
            self.timer.as_mut().reset(self.until.min(self.quiet_until));
        }
        loop {
            ready!(self.timer.as_mut().poll(context));
            let end = self.until.min(self.quiet_until);
            if end <= Instant::now() {
                return Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, "stayed too long"));
            }
            // It has spoken since.
            self.timer.as_mut().reset(end);
        }
    }
}

/// A connection within its bounds.
pub(crate) struct Bounded {
    stream: Box<dyn Stream>,
    peer: Peer,
    /// Until it has begun to speak.
    unheard: Option<Unheard>,
    guest: Option<Box<Guest>>,
}

impl Bounded {
    /// Whether it is nobody's that is known.
    pub(crate) fn is_guest(&self) -> bool {
        self.guest.is_some()
    }

    /// Fails when the connection is to end: whatever is done with it then, for one that does not read may
    /// be waited for in writing. As an error, so that nothing is left to be written.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if let Some(unheard) = &mut self.unheard
            && unheard.poll_end(context).is_ready()
        {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the hub stops"));
        }
        match self.guest.as_mut().map(|guest| guest.poll_end(context)) {
            Some(Poll::Ready(error)) => Err(error),
            Some(Poll::Pending) | None => Ok(()),
        }
    }

    /// Notes that so much has been read.
    fn heard(&mut self, bytes: usize) {
        if bytes == 0 {
            return;
        }
        if let Some(unheard) = &mut self.unheard {
            unheard.read = unheard.read.saturating_add(u8::try_from(bytes).unwrap_or(u8::MAX));
            if unheard.read >= PREFACE {
                self.unheard = None;
            }
        }
        if let Some(guest) = &mut self.guest {
            guest.quiet_until = Instant::now() + guest.times.quiet;
        }
    }
}

impl Connected for Bounded {
    type ConnectInfo = Peer;
    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Bounded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        self.heard(buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
    use tokio::time::timeout;

    use super::*;

    /// As long as nobody waits, and longer than a test.
    const FOR_EVER: Duration = Duration::from_secs(3600);
    const A_MOMENT: Duration = Duration::from_millis(50);
    /// What a test waits for that is to happen.
    const PATIENCE: Duration = Duration::from_secs(30);
    const ENDLESS: Times = Times { quiet: FOR_EVER, stay: FOR_EVER, leaving: FOR_EVER };

    fn guests(times: Times) -> (Guests, CancellationToken) {
        let stop = CancellationToken::new();
        (Guests { times, ..Guests::new(FOR_EVER, stop.clone()) }, stop)
    }

    fn guest_of(guests: &Guests, address: &str) -> Option<(DuplexStream, Bounded)> {
        let (far, near) = tokio::io::duplex(64);
        let peer = Peer::Anonymous(std::net::SocketAddr::new(address.parse().unwrap(), 1));
        Some((far, guests.let_in(PeerStream { stream: Box::new(near), peer })?))
    }

    fn known(guests: &Guests) -> (DuplexStream, Bounded) {
        let (far, near) = tokio::io::duplex(64);
        let peer = Peer::Local { uid: 0 };
        (far, guests.let_in(PeerStream { stream: Box::new(near), peer }).unwrap())
    }

    /// What the connection ends with.
    async fn end(stream: &mut Bounded) -> io::ErrorKind {
        let read = timeout(PATIENCE, stream.read(&mut [0])).await;
        read.expect("it ends").unwrap_err().kind()
    }

    /// Whether nothing happens to it, for longer than a guest has.
    async fn goes_on(stream: &mut Bounded) -> bool {
        timeout(4 * A_MOMENT, stream.read(&mut [0])).await.is_err()
    }

    #[tokio::test]
    async fn a_guest_that_says_nothing_is_sent_away_and_one_that_is_known_is_not() {
        let (guests, _stop) = guests(Times { quiet: A_MOMENT, ..ENDLESS });
        let (_known_far, mut known) = known(&guests);
        let (_far, mut silent) = guest_of(&guests, "192.0.2.1").unwrap();
        assert_eq!(end(&mut silent).await, io::ErrorKind::TimedOut);
        assert!(goes_on(&mut known).await);
    }

    #[tokio::test]
    async fn a_guest_that_goes_on_speaking_stays_for_a_call_and_no_longer() {
        let (guests, _stop) = guests(Times { stay: 4 * A_MOMENT, ..ENDLESS });
        let (mut far, mut speaking) = guest_of(&guests, "192.0.2.1").unwrap();
        let begun = Instant::now();
        let talking = async {
            loop {
                far.write_all(b"x").await.unwrap();
                match speaking.read(&mut [0]).await {
                    Ok(_) => tokio::time::sleep(A_MOMENT / 5).await,
                    Err(error) => return error.kind(),
                }
            }
        };
        let ended = timeout(PATIENCE, talking).await.expect("it ends");
        assert_eq!(ended, io::ErrorKind::TimedOut);
        assert!(begun.elapsed() >= 4 * A_MOMENT, "it has its time");
    }

    #[tokio::test]
    async fn what_a_guest_says_gives_it_time_again() {
        let (guests, _stop) = guests(Times { quiet: 20 * A_MOMENT, ..ENDLESS });
        let (mut far, mut speaking) = guest_of(&guests, "192.0.2.1").unwrap();
        let begun = Instant::now();
        assert!(goes_on(&mut speaking).await);
        far.write_all(b"x").await.unwrap();
        speaking.read_exact(&mut [0]).await.unwrap();
        assert_eq!(end(&mut speaking).await, io::ErrorKind::TimedOut);
        assert!(begun.elapsed() >= 24 * A_MOMENT, "counted from what it said");
    }

    #[tokio::test]
    async fn a_guest_that_does_not_read_is_sent_away_as_well() {
        let (guests, _stop) = guests(Times { quiet: A_MOMENT, ..ENDLESS });
        let (_far, mut deaf) = guest_of(&guests, "192.0.2.1").unwrap();
        let written = timeout(PATIENCE, deaf.write_all(&[0; 1000])).await.expect("it ends");
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn one_address_has_a_share_of_the_places_for_guests_and_gets_them_back() {
        let (guests, _stop) = guests(ENDLESS);
        let mut here: Vec<_> =
            (0..GUESTS_OF_ADDRESS).map(|_| guest_of(&guests, "192.0.2.1").unwrap()).collect();
        assert!(guest_of(&guests, "192.0.2.1").is_none(), "it has its share");
        assert!(guest_of(&guests, "192.0.2.2").is_some(), "others find places");
        here.pop();
        assert!(guest_of(&guests, "192.0.2.1").is_some());
    }

    #[tokio::test]
    async fn a_stop_soon_ends_guests_and_whoever_has_not_begun_to_speak_and_hears_who_does() {
        let (guests, stop) = guests(Times { leaving: A_MOMENT, ..ENDLESS });
        let (mut early, mut unheard) = known(&guests);
        let (mut guest_far, mut guest) = guest_of(&guests, "192.0.2.1").unwrap();
        let (mut known_far, mut known) = known(&guests);
        let (mut late_far, mut late) = self::known(&guests);
        for (far, stream, said) in [
            (&mut early, &mut unheard, PREFACE - 1),
            (&mut guest_far, &mut guest, PREFACE),
            (&mut known_far, &mut known, PREFACE),
        ] {
            let mut said = vec![0; usize::from(said)];
            far.write_all(&said).await.unwrap();
            stream.read_exact(&mut said).await.unwrap();
        }
        let stopped = Instant::now();
        stop.cancel();
        late_far.write_all(&[0; PREFACE as usize]).await.unwrap();
        late.read_exact(&mut [0; PREFACE as usize]).await.unwrap();
        assert_eq!(end(&mut unheard).await, io::ErrorKind::ConnectionAborted);
        assert_eq!(end(&mut guest).await, io::ErrorKind::TimedOut);
        assert!(stopped.elapsed() >= A_MOMENT, "it has a moment for its call");
        assert!(
            goes_on(&mut late).await && goes_on(&mut known).await,
            "it says itself when it has finished"
        );
    }
}
