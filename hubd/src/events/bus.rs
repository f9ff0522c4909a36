//! The bus: a ring in memory, a writer beside it, and subscribers that are cursors.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cortex_shared::backoff::Backoff;
use cortex_shared::clock::unix_ms;
use cortex_shared::tasks::TaskScope;
use tokio::sync::watch;

use super::event::{Cursor, Event, Kind, NewEvent};
use crate::store::StoreError;
use crate::store::events::EventStore;

/// Between two batches that are written.
const INTERVAL: Duration = Duration::from_millis(100);
/// Events of one batch.
const BATCH: usize = 512;
/// How soon a batch that failed is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// Events that a subscriber reads from the database at once.
const PAGE: u32 = 128;
/// So many are written before the number of those kept is looked at.
const TRIM_EVERY: u64 = 4096;

/// A cursor beyond all that are ever given: what a subscriber makes up is no higher, so that the next one
/// is still a number.
const HIGHEST: u64 = u64::MAX - 1;

/// How much is kept of events, and for how many subscribers.
#[derive(Clone, Copy, Debug)]
pub struct EventLimits {
    /// Events in memory; some hundred bytes each.
    pub in_memory: usize,
    /// Events on disk.
    pub kept: u64,
    /// How long they are kept there.
    pub keep_for: Duration,
    /// Subscriptions that one operator may have at once.
    pub subscriptions: usize,
}

impl Default for EventLimits {
    /// A storm of some thousand nodes in memory, and some 50 MiB on disk.
    fn default() -> Self {
        Self {
            in_memory: 8192,
            kept: 100_000,
            keep_for: Duration::from_secs(7 * 24 * 3600),
            subscriptions: 256,
        }
    }
}

/// An operator has as many subscriptions as it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an operator may follow events {limit} times at once")]
pub struct TooManySubscriptions {
    /// How many that is.
    pub limit: usize,
}

/// What has become of events since the hub started, for those who measure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Events that happened.
    pub published: u64,
    /// Events that left the ring before they were written.
    pub unwritten: u64,
    /// Events that subscribers were told they missed.
    pub missed: u64,
    /// Subscriptions there are now.
    pub subscriptions: usize,
}

struct Ring {
    events: VecDeque<Arc<Event>>,
    /// The next event's cursor.
    next: u64,
    /// Everything up to here is in the database.
    written: u64,
}

/// See the module.
pub struct EventBus {
    ring: Mutex<Ring>,
    /// The first cursor of this hub. From there on none is left out.
    first: u64,
    limits: EventLimits,
    newest: watch::Sender<u64>,
    store: Option<EventStore>,
    /// One batch at a time, so that they stay in order.
    writing: tokio::sync::Mutex<()>,
    subscribers: Mutex<HashMap<String, usize>>,
    unwritten: AtomicU64,
    missed: AtomicU64,
}

impl EventBus {
    /// A bus that keeps nothing on disk.
    #[must_use]
    pub fn in_memory(limits: EventLimits) -> Arc<Self> {
        Arc::new(Self::new(None, Cursor(0), limits))
    }

    /// A bus on this database, written by a task of `scope`. Its first event says that the hub has
    /// started.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn start(
        store: EventStore,
        limits: EventLimits,
        scope: &TaskScope,
    ) -> Result<Arc<Self>, StoreError> {
        let left = store.begin().await?;
        let bus = Arc::new(Self::new(Some(store), left.newest, limits));
        let started = NewEvent::of_hub().with("version", env!("CARGO_PKG_VERSION"));
        bus.publish(Kind::HubStarted, started.with("after_crash", !left.clean));
        let (writer, stop) = (Arc::clone(&bus), scope.token().clone());
        scope.spawn("events", async move {
            stop.run_until_cancelled(writer.write_for_ever()).await;
        });
        Ok(bus)
    }

    fn new(store: Option<EventStore>, newest: Cursor, limits: EventLimits) -> Self {
        // Beginning at the time keeps cursors growing over restarts without a write, also after a crash
        // that lost the last ones, and after an older copy of the database was put back.
        let now = u64::try_from(unix_ms()).unwrap_or_default().saturating_mul(1000);
        let first = now.max(newest.0 + 1);
        let ring = Ring { events: VecDeque::new(), next: first, written: first - 1 };
        Self {
            ring: Mutex::new(ring),
            first,
            limits,
            newest: watch::Sender::new(first - 1),
            store,
            writing: tokio::sync::Mutex::default(),
            subscribers: Mutex::default(),
            unwritten: AtomicU64::new(0),
            missed: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells everybody who may hear of it that something has happened. Waits for nobody.
    pub fn publish(&self, kind: Kind, about: NewEvent) {
        let about = about.within_limits();
        let mut ring = self.lock();
        let cursor = Cursor(ring.next);
        ring.next += 1;
        ring.events.push_back(Arc::new(Event { cursor, at_ms: unix_ms(), kind, about }));
        if ring.events.len() > self.limits.in_memory.max(1)
            && let Some(oldest) = ring.events.pop_front()
            && self.store.is_some()
            && oldest.cursor.0 > ring.written
        {
            ring.written = oldest.cursor.0;
            self.unwritten.fetch_add(1, Ordering::Relaxed);
        }
        // Within the lock: the newest is never replaced by an older one.
        self.newest.send_replace(cursor.0);
    }

    /// The newest event.
    #[must_use]
    pub fn newest(&self) -> Cursor {
        Cursor(*self.newest.borrow())
    }

    /// What has become of events since the hub started.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let subscribers = self.subscribers.lock().unwrap_or_else(PoisonError::into_inner);
        Counters {
            published: self.newest().0 + 1 - self.first,
            unwritten: self.unwritten.load(Ordering::Relaxed),
            missed: self.missed.load(Ordering::Relaxed),
            subscriptions: subscribers.values().sum(),
        }
    }

    /// Events after a cursor, and what comes; after 0 all that are kept; without one, only what comes.
    ///
    /// # Errors
    /// See [`TooManySubscriptions`].
    pub fn subscribe(
        self: &Arc<Self>,
        name: &str,
        after: Option<Cursor>,
    ) -> Result<Subscription, TooManySubscriptions> {
        let mut subscribers = self.subscribers.lock().unwrap_or_else(PoisonError::into_inner);
        let count = subscribers.entry(name.to_owned()).or_default();
        if *count >= self.limits.subscriptions {
            return Err(TooManySubscriptions { limit: self.limits.subscriptions });
        }
        *count += 1;
        drop(subscribers);
        let newest = self.newest.subscribe();
        let at = after.map_or(*newest.borrow(), |after| after.0.min(HIGHEST));
        let (bus, name) = (Arc::clone(self), name.to_owned());
        Ok(Subscription { bus, name, at, page: VecDeque::new(), newest })
    }

    async fn write_for_ever(&self) {
        let mut newest = self.newest.subscribe();
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        loop {
            newest.mark_unchanged();
            let pause = match self.write().await {
                Ok(()) => {
                    backoff.reset();
                    INTERVAL
                }
                Err(error) => {
                    tracing::warn!(%error, "events were not written; they are tried again");
                    backoff.next_delay()
                }
            };
            tokio::time::sleep(pause).await;
            if self.lock().written == self.newest().0 {
                // The sender is in `self`: it does not go away meanwhile.
                newest.changed().await.ok();
            }
        }
    }

    /// Writes what is in the ring and not in the database.
    async fn write(&self) -> Result<(), StoreError> {
        let Some(store) = &self.store else { return Ok(()) };
        let _one = self.writing.lock().await;
        loop {
            let batch: Vec<_> = {
                let ring = self.lock();
                let waiting = ring.events.partition_point(|event| event.cursor.0 <= ring.written);
                ring.events.iter().skip(waiting).take(BATCH).cloned().collect()
            };
            let (Some(first), Some(last)) = (batch.first(), batch.last()) else { return Ok(()) };
            let (first, last) = (first.cursor.0, last.cursor.0);
            store.append(batch).await?;
            {
                let mut ring = self.lock();
                ring.written = ring.written.max(last);
            }
            if first / TRIM_EVERY != (last + 1) / TRIM_EVERY {
                self.trim().await?;
            }
        }
    }

    /// Removes what is too old or too much from the database. How many went.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn trim(&self) -> Result<usize, StoreError> {
        let Some(store) = &self.store else { return Ok(0) };
        let keep_for = i64::try_from(self.limits.keep_for.as_millis()).unwrap_or(i64::MAX);
        store.trim(self.limits.kept, unix_ms().saturating_sub(keep_for)).await
    }

    /// Writes everything, and notes that nothing is missing. After the last event, before the database
    /// closes.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn finish(&self) -> Result<(), StoreError> {
        self.write().await?;
        match &self.store {
            Some(store) if self.unwritten.load(Ordering::Relaxed) == 0 => store.end().await,
            Some(_) | None => Ok(()),
        }
    }
}

/// What a subscriber gets.
#[derive(Clone, Debug, PartialEq)]
pub enum Delivery {
    /// The next event.
    Event(Arc<Event>),
    /// Events before the next one are not there any more.
    Missed {
        /// How many, if that can be told.
        count: Option<u64>,
        /// The subscriber is here now.
        to: Cursor,
    },
}

/// A place in the stream of events. Costs its cursor, however far behind it is; gone when dropped.
pub struct Subscription {
    bus: Arc<EventBus>,
    name: String,
    /// Everything up to here was delivered.
    at: u64,
    /// Read from the database ahead.
    page: VecDeque<Event>,
    newest: watch::Receiver<u64>,
}

/// What the ring has for a subscriber.
enum InRing {
    Next(Arc<Event>),
    /// Nothing yet.
    Nothing,
    /// The ring begins with this event, which is not the next one.
    From(Arc<Event>),
}

impl Subscription {
    /// Where it is: everything up to here was delivered.
    #[must_use]
    pub fn at(&self) -> Cursor {
        Cursor(self.at)
    }

    /// The next delivery, as soon as there is one. May be dropped while it waits.
    ///
    /// # Errors
    /// Those of the database, where the subscriber is so far behind. The next call tries again.
    pub async fn next(&mut self) -> Result<Delivery, StoreError> {
        loop {
            if let Some(event) = self.page.front() {
                let in_a_row =
                    event.cursor.0 == self.at + 1 || event.kind == Kind::HubStarted || self.at == 0;
                if !in_a_row {
                    let to = event.cursor.0 - 1;
                    return Ok(self.missed(Some(to - self.at), to));
                }
                let event = self.page.pop_front().map(Arc::new);
                if let Some(event) = event {
                    self.at = event.cursor.0;
                    return Ok(Delivery::Event(event));
                }
            }
            self.newest.mark_unchanged();
            match self.look() {
                InRing::Next(event) => {
                    self.at = event.cursor.0;
                    return Ok(Delivery::Event(event));
                }
                InRing::From(oldest) => {
                    if let Some(delivery) = self.read_before(&oldest).await? {
                        return Ok(delivery);
                    }
                }
                InRing::Nothing => {
                    let newest = *self.newest.borrow();
                    if self.at > newest {
                        // Not a cursor of this hub's past: of another one, or made up.
                        return Ok(self.missed(None, newest));
                    }
                    // The bus outlives its subscribers.
                    self.newest.changed().await.ok();
                }
            }
        }
    }

    fn look(&self) -> InRing {
        let ring = self.bus.lock();
        let Some(oldest) = ring.events.front() else { return InRing::Nothing };
        if self.at + 1 < oldest.cursor.0 {
            return InRing::From(Arc::clone(oldest));
        }
        // Within a hub's time no cursor is left out.
        let index = usize::try_from(self.at + 1 - oldest.cursor.0).unwrap_or(usize::MAX);
        ring.events.get(index).map_or(InRing::Nothing, |event| InRing::Next(Arc::clone(event)))
    }

    /// Reads what stands in the database before the oldest event in memory.
    async fn read_before(&mut self, oldest: &Event) -> Result<Option<Delivery>, StoreError> {
        if let Some(store) = &self.bus.store {
            let page = store.between(Cursor(self.at), oldest.cursor, PAGE).await?;
            if self.at == 0 {
                self.at = page.floor.0;
            } else if self.at < page.floor.0 {
                return Ok(Some(self.missed(None, page.floor.0)));
            }
            if let Some(read_to) = page.read_to {
                if page.events.is_empty() {
                    self.at = read_to.0;
                }
                self.page = page.events.into();
                return Ok(None);
            }
        }
        // Nothing stands between: the ring goes on here, or what was between is lost.
        let to = oldest.cursor.0 - 1;
        if oldest.kind == Kind::HubStarted || self.at == 0 {
            self.at = to;
            return Ok(None);
        }
        let count = (self.at + 1 >= self.bus.first).then(|| to - self.at);
        Ok(Some(self.missed(count, to)))
    }

    fn missed(&mut self, count: Option<u64>, to: u64) -> Delivery {
        self.at = to;
        self.bus.missed.fetch_add(count.unwrap_or(1), Ordering::Relaxed);
        Delivery::Missed { count, to: Cursor(to) }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut subscribers = self.bus.subscribers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = subscribers.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                subscribers.remove(&self.name);
            }
        }
    }
}

#[cfg(test)]
mod tests;
