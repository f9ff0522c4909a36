//! What happens, for those who want to hear of it: one bus, from which every subscriber reads at its own
//! pace.
//!
//! Whoever does something publishes it ([`EventBus::publish`]), which waits for nobody: the event gets
//! the next cursor and goes to the end of a ring in memory. A task writes the ring to a database of its
//! own some times a second. A subscriber is a cursor and nothing else. It is served from the ring, and
//! from the database where it is further behind; so a slow one costs no memory and misses nothing that is
//! kept. What it does miss (events that were removed for their age or number, or that a stalled disk did
//! not take before the ring was full) it is told in numbers, in their place. One that is dropped is
//! forgotten by that.
//!
//! Cursors grow over restarts: each hub begins at its time in microseconds. A crash loses the events of the
//! last moments that were not written yet; the first event of the next hub says so (`after_crash`).
//! Events are news, not records: what counts stands in the journal and the audit log.
//!
//! Whether a subscriber may hear of an event is asked when it is delivered ([`audience`]), once for each
//! event, whatever ways there are to see what it is about.

pub mod audience;
mod bus;
mod event;
mod feed;

pub use audience::{Audience, Knowledge, Viewer};
pub use bus::{Counters, Delivery, EventBus, EventLimits, Subscription, TooManySubscriptions};
pub use event::{Cursor, Event, Kind, Named, NewEvent};
pub use feed::{EventFeed, Frame, FrameStream};
