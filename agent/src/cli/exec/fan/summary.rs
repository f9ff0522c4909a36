//! How it went on each node, and what is said of all. Pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use cortex_proto::v1;

use super::targets::Target;
use crate::cli::error::{CliError, Exit, printable};
use crate::cli::exec::check;
use crate::cli::exec::document::Document;
use crate::cli::exec::writer::Captured;

/// Most nodes that are named beside one hint.
const MAX_HINT_NAMES: usize = 5;

/// How it went on one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fate {
    Succeeded,
    /// The command ended otherwise, or the node or hub refused it: exit code and why.
    Failed(u8, String),
    /// It began, and its end or part of its output is not known here.
    Lost(String),
    /// It did not begin: the node is offline or does not answer.
    NotReached(String),
    /// Not even tried: enough had failed, or somebody interrupted.
    NotStarted,
    /// Ended because somebody interrupted here.
    Interrupted,
}

/// A node and how it went there.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) target: Target,
    pub(super) fate: Fate,
    pub(super) document: Document,
}

/// What a conversation came to.
pub(super) struct Course {
    pub(super) accepted: v1::ExecAccepted,
    /// The exit; none if it was not heard of in time after a cancel.
    pub(super) exit: Result<Option<v1::TaskExit>, CliError>,
    /// Why the output is not complete.
    pub(super) incomplete: Option<String>,
    pub(super) captured: Captured,
    pub(super) too_much: bool,
    pub(super) interrupted: bool,
}

impl Report {
    pub(super) fn new(target: Target, course: Course) -> Self {
        let fate = course.fate();
        let exit = course.exit.as_ref().ok().and_then(Option::as_ref);
        let accepted = v1::ExecAccepted {
            node_id: target.id.as_bytes().to_vec().into(),
            node_name: target.name.clone(),
            ..course.accepted
        };
        let complete = exit.is_some() && course.incomplete.is_none();
        let mut document = Document::new(&accepted, exit, &course.captured, complete, fate.code());
        document.truncated |= course.too_much;
        if let Some(why) = fate.why().filter(|_| document.reason.is_empty()) {
            document.reason = why.to_owned();
        }
        if let Err(error) = &course.exit {
            document = document.with_error(error);
        }
        Self { target, fate, document }
    }

    /// Of a node that was not even tried.
    pub(super) fn not_started(target: Target) -> Self {
        let course = Course {
            accepted: v1::ExecAccepted::default(),
            exit: Ok(None),
            incomplete: None,
            captured: Captured::default(),
            too_much: false,
            interrupted: false,
        };
        let mut report = Self::new(target, course);
        report.fate = Fate::NotStarted;
        report.document.verdict = "not_started";
        report.document.code = Fate::NotStarted.code();
        report.document.reason.clear();
        report
    }
}

impl Course {
    fn fate(&self) -> Fate {
        let exit = match &self.exit {
            Ok(Some(exit)) => exit,
            Ok(None) => return Fate::Lost("its end was not heard of in time".to_owned()),
            Err(error) if !self.accepted.task_id.is_empty() => return Fate::Lost(error.message()),
            Err(error) if error.exit() == Exit::Forbidden => {
                return Fate::Failed(126, error.message());
            }
            Err(error) => return Fate::NotReached(error.message()),
        };
        let code = check::exit_code(exit);
        let reason = match exit.reason.as_str() {
            "" => check::verdict_name(exit.verdict).replace('_', " "),
            reason => printable(reason),
        };
        match exit.verdict() {
            _ if self.too_much => {
                let bytes = exit.stdout_bytes.saturating_add(exit.stderr_bytes);
                let text = format!("it wrote more than --max-output allows: {bytes} bytes in all");
                Fate::Failed(code.max(1), text)
            }
            v1::TaskVerdict::Cancelled if self.interrupted => Fate::Interrupted,
            v1::TaskVerdict::Failed
            | v1::TaskVerdict::StreamLost
            | v1::TaskVerdict::Unspecified => Fate::Lost(reason),
            _ if self.incomplete.is_some() => {
                let problem = self.incomplete.as_deref().unwrap_or_default();
                Fate::Lost(format!("the output is incomplete: {problem}"))
            }
            v1::TaskVerdict::Exited if code == 0 => Fate::Succeeded,
            v1::TaskVerdict::Exited => Fate::Failed(code, format!("exit code {code}")),
            v1::TaskVerdict::Signalled => {
                Fate::Failed(code, format!("ended by signal {}", exit.signal))
            }
            _ => Fate::Failed(code, reason),
        }
    }
}

impl Fate {
    /// What `exec` would end with if this were its only target.
    pub(super) fn code(&self) -> u8 {
        match self {
            Self::Succeeded => 0,
            Self::Failed(code, _) => *code,
            Self::Lost(_) | Self::NotReached(_) | Self::NotStarted => 125,
            Self::Interrupted => 130,
        }
    }

    fn why(&self) -> Option<&str> {
        match self {
            Self::Failed(_, why) | Self::Lost(why) | Self::NotReached(why) => Some(why),
            Self::Succeeded | Self::NotStarted | Self::Interrupted => None,
        }
    }
}

/// What `exec` ends with: 130 interrupted, 125 if anything is not known, 1 if anything failed.
pub(super) fn exit_code(reports: &[Report], interrupted: bool) -> u8 {
    let any = |wanted: fn(&Fate) -> bool| reports.iter().any(|report| wanted(&report.fate));
    if interrupted {
        130
    } else if any(|fate| matches!(fate, Fate::Lost(_) | Fate::NotReached(_))) {
        125
    } else {
        u8::from(any(|fate| *fate != Fate::Succeeded))
    }
}

/// What is said at the end: the count, then each node where it did not go well, by kind.
pub(super) fn text(reports: &[Report]) -> String {
    let of = |wanted: fn(&Fate) -> bool| {
        reports.iter().filter(move |report| wanted(&report.fate)).collect::<Vec<_>>()
    };
    let kinds = [
        ("failed", of(|fate| matches!(fate, Fate::Failed(..)))),
        ("lost", of(|fate| matches!(fate, Fate::Lost(_)))),
        ("not reached", of(|fate| matches!(fate, Fate::NotReached(_)))),
        ("interrupted", of(|fate| *fate == Fate::Interrupted)),
        ("not started", of(|fate| *fate == Fate::NotStarted)),
    ];
    let succeeded = of(|fate| *fate == Fate::Succeeded).len();
    let mut text = format!("{succeeded} of {} succeeded", reports.len());
    for (kind, reports) in &kinds {
        if !reports.is_empty() {
            write!(text, ", {} {kind}", reports.len()).expect("writing to a string succeeds");
        }
    }
    text.push('\n');
    for (kind, reports) in &kinds {
        for report in reports {
            let why = report.fate.why().map(|why| format!(" ({why})")).unwrap_or_default();
            writeln!(text, "{kind}: {}{why}", report.target.name)
                .expect("writing to a string succeeds");
        }
    }
    // What commands left behind is worth a word even where all went well; once for all that say it.
    let mut hints: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for report in reports.iter().filter(|report| {
        let by_itself = ["exited", "signalled"].contains(&report.document.verdict);
        by_itself && !report.document.hint.is_empty()
    }) {
        hints.entry(&report.document.hint).or_default().push(&report.target.name);
    }
    for (hint, names) in hints {
        let more = names.len().saturating_sub(MAX_HINT_NAMES);
        let shown = names[..names.len() - more].join(", ");
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        writeln!(text, "hint: on {shown}{more}: {}", printable(hint))
            .expect("writing to a string succeeds");
    }
    text
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use cortex_shared::ids::NodeId;

    use super::*;

    fn target(name: &str) -> Target {
        Target { id: NodeId::new(), name: name.to_owned(), online: true }
    }

    fn course(exit: Result<Option<v1::TaskExit>, CliError>) -> Course {
        let task_id = Bytes::copy_from_slice(NodeId::new().as_bytes());
        Course {
            accepted: v1::ExecAccepted { task_id, ..Default::default() },
            exit,
            incomplete: None,
            captured: Captured::default(),
            too_much: false,
            interrupted: false,
        }
    }

    fn exited(exit_code: u32) -> Course {
        let verdict = v1::TaskVerdict::Exited.into();
        course(Ok(Some(v1::TaskExit { verdict, exit_code, ..Default::default() })))
    }

    fn ended(verdict: v1::TaskVerdict) -> Course {
        course(Ok(Some(v1::TaskExit { verdict: verdict.into(), ..Default::default() })))
    }

    fn not_accepted(exit: Exit) -> Course {
        let accepted = v1::ExecAccepted::default();
        Course { accepted, ..course(Err(CliError::new(exit, "node \"a\" is offline"))) }
    }

    #[test]
    fn every_course_has_its_fate_and_all_together_their_exit_code() {
        use v1::TaskVerdict::{Cancelled, Failed, NotFound, Refused, StreamLost, TimeLimit};
        type Check = fn(&Fate) -> bool;
        let cases: Vec<(Course, Check, u8)> = vec![
            (exited(0), |fate| *fate == Fate::Succeeded, 0),
            (exited(3), |fate| matches!(fate, Fate::Failed(3, _)), 1),
            (ended(TimeLimit), |fate| matches!(fate, Fate::Failed(124, _)), 1),
            (ended(Refused), |fate| matches!(fate, Fate::Failed(126, _)), 1),
            (ended(NotFound), |fate| matches!(fate, Fate::Failed(127, _)), 1),
            (ended(Cancelled), |fate| matches!(fate, Fate::Failed(143, _)), 1),
            (ended(Failed), |fate| matches!(fate, Fate::Lost(_)), 125),
            (ended(StreamLost), |fate| matches!(fate, Fate::Lost(_)), 125),
            (not_accepted(Exit::Unreachable), |fate| matches!(fate, Fate::NotReached(_)), 125),
            (not_accepted(Exit::Forbidden), |fate| matches!(fate, Fate::Failed(126, _)), 1),
            (
                course(Err(CliError::new(Exit::Unreachable, "gone"))),
                |fate| matches!(fate, Fate::Lost(_)),
                125,
            ),
            (
                Course { incomplete: Some("x".to_owned()), ..exited(0) },
                |fate| matches!(fate, Fate::Lost(_)),
                125,
            ),
            (Course { too_much: true, ..exited(0) }, |fate| matches!(fate, Fate::Failed(1, _)), 1),
        ];
        for (course, fits, code) in cases {
            let reports =
                [Report::new(target("good"), exited(0)), Report::new(target("bad"), course)];
            let fate = &reports[1].fate;
            assert!(fits(fate), "{fate:?}");
            assert_eq!(exit_code(&reports, false), code, "{fate:?}");
            assert_eq!(exit_code(&reports, true), 130);
            if code != 0 {
                assert!(text(&reports).contains(": bad"), "{}", text(&reports));
            }
            assert!(!text(&reports).contains(": good"));
        }
    }

    #[test]
    fn output_past_the_most_is_counted() {
        let verdict = v1::TaskVerdict::Cancelled.into();
        let exit = v1::TaskExit { verdict, stdout_bytes: 7, stderr_bytes: 5, ..Default::default() };
        let course = Course { too_much: true, ..course(Ok(Some(exit))) };
        let report = Report::new(target("a"), course);
        assert!(report.fate.why().unwrap().contains("12 bytes"), "{:?}", report.fate);
        let document = &report.document;
        assert!(document.truncated && document.stdout_bytes == 7 && document.stderr_bytes == 5);
    }

    #[test]
    fn a_hint_of_many_nodes_is_said_once() {
        let planted = |name: &str| {
            let mut report = Report::new(target(name), exited(0));
            report.document.hint = "look at .envrc".to_owned();
            report
        };
        let reports: Vec<_> = ["a", "b", "c", "d", "e", "f", "g"].map(planted).into();
        let said = text(&reports);
        assert!(said.ends_with("hint: on a, b, c, d, e and 2 more: look at .envrc\n"), "{said}");
        assert_eq!(said.matches("hint:").count(), 1);
    }

    #[test]
    fn summary_counts_and_names() {
        let reports = [
            Report::new(target("a"), exited(0)),
            Report::new(target("b"), exited(3)),
            Report::new(target("c"), not_accepted(Exit::Unreachable)),
            Report::not_started(target("d")),
            Report::new(target("e"), not_accepted(Exit::Forbidden)),
        ];
        assert_eq!(
            text(&reports),
            "1 of 5 succeeded, 2 failed, 1 not reached, 1 not started\n\
             failed: b (exit code 3)\n\
             failed: e (node \"a\" is offline)\n\
             not reached: c (node \"a\" is offline)\n\
             not started: d\n"
        );
        let verdicts: Vec<_> = reports.iter().map(|report| report.document.verdict).collect();
        assert_eq!(verdicts, ["exited", "exited", "not_reached", "not_started", "refused"]);
    }
}
