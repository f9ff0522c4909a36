//! Whether the library here is at least as new as some moment.
//!
//! When a directory is promoted, its link may reach a member before the skill has. Its files would then be
//! neither here nor there. So whoever is about to put such a link in the place of a directory asks for a
//! library that is as new as the link, and leaves the directory alone until there is one. Nothing is
//! stored: whoever starts anew asks anew.

use std::sync::Arc;

use tokio::sync::watch;

/// Asks for a fresh library, and tells when there is one. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Freshness(Arc<State>);

#[derive(Debug, Default)]
struct State {
    asked: watch::Sender<u64>,
    done: watch::Sender<u64>,
}

/// The moment of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

impl Freshness {
    /// Asks for a library that is as new as this moment.
    #[must_use]
    pub fn ask(&self) -> Ticket {
        let mut ticket = 0;
        self.0.asked.send_modify(|asked| {
            *asked += 1;
            ticket = *asked;
        });
        Ticket(ticket)
    }

    /// Whether the library has been as new as that since.
    #[must_use]
    pub fn is_done(&self, ticket: Ticket) -> bool {
        *self.0.done.borrow() >= ticket.0
    }

    /// Waits until somebody asks for what has not been done; what has to be done then.
    pub async fn asked(&self) -> Ticket {
        let mut asked = self.0.asked.subscribe();
        let done = *self.0.done.borrow();
        // The sender lives as long as `self`.
        asked.wait_for(|asked| *asked > done).await.ok();
        Ticket(*asked.borrow())
    }

    /// The library is as new as that.
    pub fn finish(&self, ticket: Ticket) {
        self.0.done.send_modify(|done| *done = ticket.0.max(*done));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_asked_later_than_it_was_looked_at_is_not_done() {
        let freshness = Freshness::default();
        let first = freshness.ask();
        let looked_at = freshness.asked().await;
        let second = freshness.ask();
        assert!(!freshness.is_done(first));
        freshness.finish(looked_at);
        assert!(freshness.is_done(first) && !freshness.is_done(second));
        assert_eq!(freshness.asked().await, second);
        freshness.finish(second);
        freshness.finish(first);
        assert!(freshness.is_done(second));
    }
}
