//! Events as an operator hears of them: those that it may, and where it is among them.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};

use super::audience::{Knowledge, Viewer};
use super::bus::{Delivery, EventBus, Subscription, TooManySubscriptions};
use super::event::{Cursor, Event};
use crate::store::StoreError;

/// How often a subscriber that hears nothing is told where it is: so that it need not begin far behind
/// when it comes back, and so that a dead connection shows.
const TELL_PLACE: Duration = Duration::from_secs(15);
/// Events that are passed over for one viewer before others have their turn.
const AT_A_STRETCH: usize = 256;
/// Events that are passed over for one viewer before it is told where it is.
const PASSED_OVER: usize = 4 * AT_A_STRETCH;

/// What a viewer hears, in order.
pub type FrameStream = BoxStream<'static, Result<Frame, StoreError>>;

/// What an operator gets.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// Something has happened that it may hear of.
    Event(Arc<Event>),
    /// Events are not there any more, of which it might have heard some.
    Missed {
        /// How many, if that can be told.
        count: Option<u64>,
        /// It is here now.
        to: Cursor,
    },
    /// Nothing has happened up to here that it may hear of.
    Place(Cursor),
}

impl Frame {
    /// Where a subscriber that has this goes on.
    #[must_use]
    pub fn cursor(&self) -> Cursor {
        match self {
            Self::Event(event) => event.cursor,
            Self::Missed { to, .. } | Self::Place(to) => *to,
        }
    }
}

/// The bus, and what decides who hears what. Clones share it.
#[derive(Clone)]
pub struct EventFeed {
    /// The bus.
    pub bus: Arc<EventBus>,
    /// What audiences are judged against.
    pub knowledge: Knowledge,
}

struct Following {
    subscription: Subscription,
    knowledge: Knowledge,
    viewer: Viewer,
    /// The viewer knows that it is here.
    told: Cursor,
    /// It wants to hear of nothing later.
    until: Option<Cursor>,
}

impl EventFeed {
    /// What this viewer may hear of after a cursor, and what comes; after 0 all that is kept; without a
    /// cursor only what comes, after a frame that tells its place. Each event once. Ends only with an error
    /// of the database. Dropping it ends the subscription. Whether the viewer is still who it was is for
    /// the caller to watch.
    ///
    /// # Errors
    /// See [`TooManySubscriptions`].
    pub fn subscribe(
        &self,
        viewer: Viewer,
        after: Option<Cursor>,
    ) -> Result<FrameStream, TooManySubscriptions> {
        self.follow(viewer, after, None)
    }

    /// The same up to what is the newest event now.
    ///
    /// # Errors
    /// See [`TooManySubscriptions`].
    pub fn replay(
        &self,
        viewer: Viewer,
        after: Cursor,
    ) -> Result<FrameStream, TooManySubscriptions> {
        self.follow(viewer, Some(after), Some(self.bus.newest()))
    }

    fn follow(
        &self,
        viewer: Viewer,
        after: Option<Cursor>,
        until: Option<Cursor>,
    ) -> Result<FrameStream, TooManySubscriptions> {
        let subscription = self.bus.subscribe(&viewer.name, after)?;
        let told = subscription.at();
        let first = after.is_none().then_some(Ok(Frame::Place(told)));
        let knowledge = self.knowledge.clone();
        let following = Following { subscription, knowledge, viewer, told, until };
        let coming = stream::unfold(Some(following), |following| async move {
            let mut following = following?;
            match following.next().await {
                Ok(Some(frame)) => Some((Ok(frame), Some(following))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(Box::pin(stream::iter(first).chain(coming)))
    }
}

impl Following {
    async fn next(&mut self) -> Result<Option<Frame>, StoreError> {
        let mut passed_over = 0;
        loop {
            if self.until.is_some_and(|until| self.subscription.at() >= until) {
                return Ok(None);
            }
            let delivery = match tokio::time::timeout(TELL_PLACE, self.subscription.next()).await {
                Ok(delivery) => delivery?,
                Err(_) => return Ok(Some(self.tell(Frame::Place(self.subscription.at())))),
            };
            match delivery {
                Delivery::Missed { count, to } => {
                    return Ok(Some(self.tell(Frame::Missed { count, to })));
                }
                Delivery::Event(event) if self.knowledge.may_hear(&self.viewer, &event) => {
                    return Ok(Some(self.tell(Frame::Event(event))));
                }
                Delivery::Event(event) => {
                    passed_over += 1;
                    if passed_over == PASSED_OVER {
                        return Ok(Some(self.tell(Frame::Place(event.cursor))));
                    }
                    if passed_over % AT_A_STRETCH == 0 {
                        tokio::task::yield_now().await;
                    }
                }
            }
        }
    }

    fn tell(&mut self, frame: Frame) -> Frame {
        self.told = frame.cursor();
        frame
    }
}
