use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::events::{Delivery, EventLimits, Subscription};

struct Fixture {
    supervisor: Arc<Supervisor>,
    events: Arc<EventBus>,
    told: Subscription,
    scope: TaskScope,
}

fn fixture() -> Fixture {
    let events = EventBus::in_memory(EventLimits::default());
    let scope = TaskScope::new();
    let supervisor = Supervisor::new(Arc::clone(&events), scope.clone());
    let told = events.subscribe("test", None).unwrap();
    Fixture { supervisor, events, told, scope }
}

const HOUR: Duration = Duration::from_secs(3600);

fn plan(name: &'static str) -> Plan {
    Plan { name, purpose: "to be tested", period: HOUR, spacing: HOUR, first: Due::AfterPeriod }
}

impl Fixture {
    fn status(&self, name: &str) -> WorkerStatus {
        self.supervisor.list().into_iter().find(|status| status.name == name).unwrap()
    }

    async fn next_event(&mut self) -> Kind {
        match self.told.next().await.unwrap() {
            Delivery::Event(event) => event.kind,
            missed @ Delivery::Missed { .. } => panic!("{missed:?}"),
        }
    }

    async fn end(self) {
        self.scope.cancel();
        self.scope.finish().await;
    }
}

/// Work that says each time that it ran.
fn counting() -> (Arc<Notify>, impl Fn() -> BoxFuture<'static, Result<Report, RunError>>) {
    let ran = Arc::new(Notify::new());
    let (said, count) = (Arc::clone(&ran), AtomicU32::new(0));
    (ran, move || {
        let run = count.fetch_add(1, Ordering::Relaxed);
        said.notify_one();
        Box::pin(async move { Ok(Report::counted(run as usize, "runs before")) })
    })
}

#[tokio::test]
async fn a_worker_runs_by_its_period() {
    let f = fixture();
    let (ran, work) = counting();
    let period = Duration::from_millis(20);
    f.supervisor.keep(Plan { period, ..plan("clock") }, work);
    let began = Instant::now();
    for _ in 0..3 {
        ran.notified().await;
    }
    assert!(began.elapsed() >= 2 * period);
    f.end().await;
}

#[tokio::test]
async fn a_worker_runs_when_something_happens_and_at_once_when_it_is_asked_to() {
    let f = fixture();
    let (ran, work) = counting();
    let happened = Arc::new(Notify::new());
    let waiting = Arc::clone(&happened);
    let trigger = Box::new(move || {
        let waiting = Arc::clone(&waiting);
        Box::pin(async move { waiting.notified().await }) as _
    });
    let spacing = Duration::from_millis(30);
    f.supervisor.keep_on(Plan { spacing, ..plan("clock") }, trigger, work);
    let mut before = Instant::now();
    for _ in 0..3 {
        happened.notify_one();
        ran.notified().await;
        assert!(before.elapsed() >= spacing, "however often it happens");
        before = Instant::now();
    }
    let status = f.supervisor.run("clock").await.unwrap();
    assert_eq!(status.last.unwrap().result, "3 runs before");
    assert_eq!((status.state, status.runs, status.failures), (State::Waiting, 4, 0));
    assert_eq!(f.supervisor.run("nobody").await.unwrap_err().name, "nobody");
    f.end().await;
}

#[tokio::test]
async fn whoever_asks_while_it_runs_gets_a_run_that_began_after_that() {
    let f = fixture();
    let (go, gate) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (going, began) = (Arc::clone(&go), Arc::clone(&gate));
    f.supervisor.keep(plan("slow"), move || {
        let (going, began) = (Arc::clone(&going), Arc::clone(&began));
        async move {
            began.notify_one();
            going.notified().await;
            Ok(Report::default())
        }
    });
    let first = f.supervisor.run("slow");
    let second = async {
        gate.notified().await;
        assert!(matches!(f.status("slow").state, State::Running { .. }));
        assert_eq!(f.status("slow").next_run_ms, None);
        let asked = f.supervisor.run("slow");
        let run = async {
            go.notify_one();
            gate.notified().await;
            go.notify_one();
        };
        tokio::join!(asked, run).0.unwrap()
    };
    let (first, second) = tokio::join!(first, second);
    assert_eq!((first.unwrap().runs, second.runs), (1, 2));
    f.end().await;
}

#[tokio::test]
async fn a_panic_is_noted_with_an_id_told_once_followed_by_another_run_and_disturbs_nobody() {
    let mut f = fixture();
    let (other, work) = counting();
    f.supervisor.keep(Plan { period: Duration::from_millis(10), ..plan("other") }, work);
    let runs = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&runs);
    f.supervisor.keep(plan("broken"), move || {
        let run = counted.fetch_add(1, Ordering::Relaxed);
        async move {
            match run {
                0 => panic!("on purpose"),
                1 => Err("it does not work".into()),
                _ => Ok(Report::default()),
            }
        }
    });
    let status = f.supervisor.run("broken").await.unwrap();
    assert_eq!((status.state, status.failures, status.panics), (State::Failing, 1, 1));
    let last = status.last.unwrap();
    assert_eq!(last.result, "panicked: on purpose");
    assert_eq!(last.error_id.unwrap().len(), 8);
    assert_eq!(f.next_event().await, Kind::WorkerFailed);
    // Well again, long before its period is over, after delays that grow.
    assert_eq!(f.next_event().await, Kind::WorkerRecovered);
    let status = f.status("broken");
    assert_eq!((status.runs, status.failures, status.panics), (3, 2, 1));
    assert_eq!(status.state, State::Waiting);
    other.notified().await;
    assert!(f.status("other").runs > 3 && f.status("other").failures == 0);
    assert_eq!(f.events.counters().published, 2);
    f.end().await;
}

#[tokio::test]
async fn a_run_can_ask_for_the_next_one_to_be_soon() {
    let f = fixture();
    let said = Arc::new(Notify::new());
    let saying = Arc::clone(&said);
    f.supervisor.keep(Plan { first: Due::Now, ..plan("eager") }, move || {
        saying.notify_one();
        let again_after = Some(Duration::from_millis(10));
        async move { Ok(Report { again_after, ..Report::default() }) }
    });
    for _ in 0..4 {
        said.notified().await;
    }
    f.end().await;
}
