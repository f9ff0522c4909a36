use proptest::prelude::*;

use super::*;

fn limits(in_memory: usize) -> EventLimits {
    EventLimits { in_memory, subscriptions: 100_000, ..EventLimits::default() }
}

fn numbered(n: u64) -> NewEvent {
    NewEvent::of_mesh().with("n", n)
}

fn publish(bus: &EventBus, numbers: std::ops::Range<u64>) {
    numbers.for_each(|n| bus.publish(Kind::InviteUsed, numbered(n)));
}

/// What a subscriber gets until it has got event `last`: the numbers of events, and `Err` for what it missed.
async fn until(subscription: &mut Subscription, last: u64) -> Vec<Result<u64, Option<u64>>> {
    let mut got = Vec::new();
    while got.last() != Some(&Ok(last)) {
        match subscription.next().await.unwrap() {
            Delivery::Event(event) if event.kind == Kind::HubStarted => {}
            Delivery::Event(event) => got.push(Ok(event.about.detail["n"].as_u64().unwrap())),
            Delivery::Missed { count, .. } => got.push(Err(count)),
        }
    }
    got
}

fn oks(numbers: std::ops::RangeInclusive<u64>) -> Vec<Result<u64, Option<u64>>> {
    numbers.map(Ok).collect()
}

struct Disk {
    folder: tempfile::TempDir,
    scope: TaskScope,
}

impl Disk {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), scope: TaskScope::new() }
    }

    async fn bus(&mut self, limits: EventLimits) -> Arc<EventBus> {
        self.scope = TaskScope::new();
        let path = self.folder.path().join("events.db");
        let store = EventStore::open(path, &self.scope).await.unwrap();
        EventBus::start(store, limits, &self.scope).await.unwrap()
    }

    async fn close(&self) {
        self.scope.cancel();
        self.scope.finish().await;
    }
}

#[tokio::test]
async fn everybody_gets_every_event_in_order_from_where_it_began() {
    let bus = EventBus::in_memory(limits(100));
    let mut early = bus.subscribe("ann", None).unwrap();
    publish(&bus, 0..3);
    let mut late = bus.subscribe("bob", None).unwrap();
    publish(&bus, 3..5);
    assert_eq!(until(&mut early, 4).await, oks(0..=4));
    assert_eq!(until(&mut late, 4).await, oks(3..=4));
    let mut back = bus.subscribe("ann", Some(Cursor(late.at().0 - 3))).unwrap();
    assert_eq!(until(&mut back, 4).await, oks(2..=4));
}

#[tokio::test]
async fn a_stalled_subscriber_is_told_how_many_it_missed_and_the_ring_does_not_grow() {
    let bus = EventBus::in_memory(limits(10));
    let mut stalled = bus.subscribe("ann", None).unwrap();
    publish(&bus, 0..1000);
    assert_eq!(bus.lock().events.len(), 10);
    let mut expected = vec![Err(Some(990))];
    expected.extend(oks(990..=999));
    assert_eq!(until(&mut stalled, 999).await, expected);
    assert_eq!(bus.counters().missed, 990);
}

#[tokio::test]
async fn a_slow_subscriber_misses_nothing_that_is_on_disk() {
    let mut disk = Disk::new();
    let bus = disk.bus(limits(300)).await;
    let mut slow = bus.subscribe("ann", None).unwrap();
    for round in 0..10 {
        publish(&bus, round * 100..(round + 1) * 100);
        bus.write().await.unwrap();
    }
    assert!(bus.lock().events.len() <= 300);
    assert_eq!(until(&mut slow, 999).await, oks(0..=999));
    assert_eq!(bus.counters().unwritten, 0);
    disk.close().await;
}

#[tokio::test]
async fn what_a_stalled_disk_did_not_take_is_missed_in_numbers_also_by_those_who_come_back() {
    let mut disk = Disk::new();
    let bus = disk.bus(limits(10)).await;
    bus.write().await.unwrap();
    let writing = bus.writing.lock().await;
    let begin = bus.newest();
    let mut slow = bus.subscribe("ann", Some(begin)).unwrap();
    publish(&bus, 0..50);
    drop(writing);
    bus.write().await.unwrap();
    publish(&bus, 50..100);
    bus.write().await.unwrap();
    let got = until(&mut slow, 99).await;
    let missed: u64 = got.iter().filter_map(|got| got.err()).map(Option::unwrap).sum();
    let heard = got.iter().filter(|got| got.is_ok()).count() as u64;
    assert_eq!((missed + heard, missed), (100, bus.counters().unwritten), "{got:?}");
    assert!(missed >= 40, "{missed}");
    disk.close().await;
}

#[tokio::test]
async fn a_subscriber_goes_on_over_a_restart_and_hears_of_a_crash() {
    let mut disk = Disk::new();
    let bus = disk.bus(limits(100)).await;
    let begin = bus.newest();
    publish(&bus, 0..5);
    bus.finish().await.unwrap();
    disk.close().await;

    let bus = disk.bus(limits(100)).await;
    publish(&bus, 5..8);
    let mut back = bus.subscribe("ann", Some(Cursor(begin.0 + 2))).unwrap();
    assert_eq!(until(&mut back, 7).await, oks(2..=7));
    let crashed = |event: &Event| event.about.detail["after_crash"].as_bool().unwrap();
    let started = |bus: &Arc<EventBus>| bus.lock().events.front().cloned().unwrap();
    assert!(!crashed(&started(&bus)));
    bus.write().await.unwrap();
    // Never written, but heard of: this cursor must not be given again.
    publish(&bus, 8..9);
    let heard = bus.newest();
    disk.close().await;

    let bus = disk.bus(limits(100)).await;
    assert!(crashed(&started(&bus)));
    assert!(bus.newest() > heard);
    publish(&bus, 9..11);
    let mut back = bus.subscribe("ann", Some(heard)).unwrap();
    assert_eq!(until(&mut back, 10).await, oks(9..=10));
    disk.close().await;
}

#[tokio::test]
async fn who_was_away_for_too_long_is_told_so_and_gets_what_is_left() {
    let mut disk = Disk::new();
    let bus = disk.bus(EventLimits { kept: 20, ..limits(10) }).await;
    let begin = bus.newest();
    for n in 0..100 {
        publish(&bus, n..n + 1);
        bus.write().await.unwrap();
    }
    bus.trim().await.unwrap();
    let mut back = bus.subscribe("ann", Some(begin)).unwrap();
    let mut expected = vec![Err(None)];
    expected.extend(oks(80..=99));
    assert_eq!(until(&mut back, 99).await, expected);
    let mut from_the_oldest = bus.subscribe("ann", Some(Cursor(0))).unwrap();
    assert_eq!(until(&mut from_the_oldest, 99).await, oks(80..=99));
    // Not of this hub's past.
    let mut strangers = Vec::new();
    for made_up in [bus.newest().0 + 1, u64::MAX - 1, u64::MAX] {
        let mut stranger = bus.subscribe("ann", Some(Cursor(made_up))).unwrap();
        let told = stranger.next().await.unwrap();
        assert_eq!(told, Delivery::Missed { count: None, to: bus.newest() });
        strangers.push(stranger);
    }
    publish(&bus, 100..101);
    for mut stranger in strangers {
        assert_eq!(until(&mut stranger, 100).await, oks(100..=100));
    }
    disk.close().await;
}

#[tokio::test]
async fn ten_thousand_subscriptions_that_are_abandoned_leave_nothing_behind() {
    let bus = EventBus::in_memory(limits(100));
    publish(&bus, 0..200);
    let open = |n: usize| {
        let (bus, after) = (Arc::clone(&bus), n.is_multiple_of(2).then_some(Cursor(0)));
        async move {
            let mut subscription = bus.subscribe(&format!("user {}", n % 50), after).unwrap();
            // Some wait, some stopped in the midst.
            if after.is_some() {
                subscription.next().await.unwrap();
            }
            subscription
        }
    };
    let all = futures_util::future::join_all((0..10_000).map(open)).await;
    assert_eq!(bus.counters().subscriptions, 10_000);
    assert_eq!(Arc::strong_count(&bus), 10_001);
    drop(all);
    assert_eq!(bus.counters().subscriptions, 0);
    assert_eq!((Arc::strong_count(&bus), bus.newest.receiver_count()), (1, 0));
    assert!(bus.subscribers.lock().unwrap().is_empty(), "nor their names");
}

#[tokio::test]
async fn an_operator_has_so_many_subscriptions_and_others_have_theirs() {
    let bus = EventBus::in_memory(EventLimits { subscriptions: 2, ..limits(10) });
    let (one, _two) = (bus.subscribe("ann", None).unwrap(), bus.subscribe("ann", None).unwrap());
    assert_eq!(bus.subscribe("ann", None).err(), Some(TooManySubscriptions { limit: 2 }));
    assert!(bus.subscribe("bob", None).is_ok());
    drop(one);
    assert!(bus.subscribe("ann", None).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever a subscriber does and whenever, what it got and what it was told to have missed are all
    /// events there were, each once and in order.
    #[test]
    fn got_and_missed_make_up_the_whole(steps in prop::collection::vec((1_u64..30, 0_u64..30), 1..30)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let bus = EventBus::in_memory(limits(16));
            let mut subscription = bus.subscribe("ann", None).unwrap();
            let (mut published, mut next) = (0, 0);
            for (more, reads) in steps {
                publish(&bus, published..published + more);
                published += more;
                for _ in 0..reads {
                    if next == published {
                        break;
                    }
                    match subscription.next().await.unwrap() {
                        Delivery::Event(event) => {
                            assert_eq!(event.about.detail["n"], next);
                            next += 1;
                        }
                        Delivery::Missed { count, .. } => next += count.unwrap(),
                    }
                }
            }
            assert!(next <= published);
        });
    }
}
