//! `bench fanout`: one command on all nodes at once, and again while some of them are behind dead lines.

use std::sync::Arc;
use std::time::Duration;

use cortex_proto::v1::operator_client::OperatorClient;
use cortex_shared::tasks::TaskScope;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::BenchError;
use super::commander::{Reading, run};
use super::crowd::Crowd;
use super::line::Line;
use super::load::{LoadReport, TRUE, Tally, UNDER_WAY, shown};
use super::process::HubProcess;
use super::statistics::{Times, millis};

pub(super) async fn fanout(
    hub: &HubProcess,
    scope: &TaskScope,
    count: u32,
    rounds: u32,
    black_holed: u32,
) -> Result<LoadReport, BenchError> {
    let crowd = Crowd::gather(hub, count, scope).await?;
    let operator = hub.operator().await?;
    let calm = Rounds::run(&crowd, &operator, scope, rounds).await;
    let mut rows =
        vec![("nodes", format!("{count}, {rounds} rounds")), ("all done", shown(&calm.all))];
    calm.tally.rows(&mut rows);
    let mut document = json!({
        "bench": "fanout", "count": count, "rounds": rounds, "all": calm.all.summary(),
        "each": calm.tally.times.summary(), "completed": calm.tally.times.len(),
        "failed": calm.tally.failed, "first_error": calm.tally.error,
    });
    let mut complete = calm.tally.failed == 0;
    if black_holed > 0 {
        let holed = beside_black_holes(hub, &crowd, &operator, scope, rounds, black_holed).await?;
        rows.push((
            "black-holed",
            format!("{black_holed}, the others all done: {}", shown(&holed.others.all)),
        ));
        rows.push((
            "their callers",
            format!("{} told after {}", holed.told.len(), shown(&holed.told)),
        ));
        holed.others.tally.rows(&mut rows);
        complete &= holed.others.tally.failed == 0 && holed.told.len() == black_holed as usize;
        document["beside_black_holes"] = holed.document(black_holed);
    }
    document["sessions_lost"] = crowd.lost().into();
    Ok(LoadReport { document, rows, complete: complete && crowd.lost() == 0 })
}

/// One command on all of a crowd, some times over.
struct Rounds {
    /// From the first call to the last answer.
    all: Times,
    tally: Tally,
}

impl Rounds {
    async fn run(
        crowd: &Crowd,
        operator: &OperatorClient<Channel>,
        scope: &TaskScope,
        rounds: u32,
    ) -> Self {
        let (mut all, mut tally) = (Times::default(), Tally::default());
        for _ in 0..rounds {
            let begun = Instant::now();
            let mut results = on_all(crowd, operator, scope).await;
            while let Some(ran) = results.recv().await {
                tally.add(ran);
            }
            all.add(begun.elapsed());
        }
        Self { all, tally }
    }
}

/// Runs a command on each node; how long each took, or why it did not end well.
async fn on_all(
    crowd: &Crowd,
    operator: &OperatorClient<Channel>,
    scope: &TaskScope,
) -> mpsc::Receiver<Result<Duration, BenchError>> {
    let (done, results) = mpsc::channel(UNDER_WAY);
    for name in crowd.names() {
        let (name, operator) = (name.clone(), operator.clone());
        let Ok(place) = done.clone().reserve_owned().await else { break };
        scope.spawn("emulated caller", async move {
            let never = CancellationToken::new();
            let ran = run(operator, &name, TRUE, Reading::All, &never).await;
            place.send(ran.map(|ran| ran.took));
        });
    }
    results
}

/// What went on beside nodes that took nothing and said nothing.
struct BesideBlackHoles {
    others: Rounds,
    /// When those who commanded the silent nodes were told that it came to nothing.
    told: Times,
    verdict: Option<String>,
}

impl BesideBlackHoles {
    fn document(&self, black_holed: u32) -> Value {
        let (all, tally) = (&self.others.all, &self.others.tally);
        json!({
            "count": black_holed, "all": all.summary(), "each": tally.times.summary(),
            "failed": tally.failed, "first_error": tally.error,
            "told": self.told.summary(), "verdict": self.verdict,
        })
    }
}

async fn beside_black_holes(
    hub: &HubProcess,
    crowd: &Crowd,
    operator: &OperatorClient<Channel>,
    scope: &TaskScope,
    rounds: u32,
    black_holed: u32,
) -> Result<BesideBlackHoles, BenchError> {
    let line = Line::default();
    let target = Arc::new(hub.target().over(&line));
    let silent = Crowd::gather_over(hub, target, black_holed, scope).await?;
    line.go_dead();
    let begun = Instant::now();
    let mut unanswered = on_all(&silent, operator, scope).await;
    let others = Rounds::run(crowd, operator, scope, rounds).await;
    let (mut told, mut verdict) = (Times::default(), None);
    while let Some(ran) = unanswered.recv().await {
        // One that says that the command was carried out would be a lie, and is not counted.
        if let Err(error) = ran {
            told.add(begun.elapsed());
            verdict.get_or_insert_with(|| error.to_string());
        }
    }
    tracing::debug!(took_ms = millis(begun.elapsed()), "all callers have their answers");
    Ok(BesideBlackHoles { others, told, verdict })
}
