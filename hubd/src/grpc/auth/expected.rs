//! Who may call what, written down a second time for the tests: a wrong level in the table shows.

/// Each method with those who may call it, in this order: `-` whoever has no certificate, `n` a node,
/// `v` viewer, `t` agent-token, `o` operator, `s` admin with a scope, `a` admin.
pub(crate) const EXPECTED: [(&str, &str); 50] = [
    ("Enroll/JoinNode", "-nvtosa"),
    ("Enroll/LoginOperator", "-nvtosa"),
    ("Enroll/RecoverNode", "-nvtosa"),
    ("Node/Renew", "n"),
    ("Node/Leave", "n"),
    ("Node/Link", "n"),
    ("Node/TaskIo", "n"),
    ("Node/RequestAttach", "n"),
    ("Node/RequestDetach", "n"),
    ("Sync/Head", "n"),
    ("Sync/Have", "n"),
    ("Sync/PutPacks", "n"),
    ("Sync/Commit", "n"),
    ("Sync/Changes", "n"),
    ("Sync/GetPacks", "n"),
    ("Sync/AckApplied", "n"),
    ("Operator/WhoAmI", "vtosa"),
    ("Operator/HubStatus", "vtosa"),
    ("Operator/ListNodes", "vtosa"),
    ("Operator/WatchNodes", "vtosa"),
    ("Operator/ListWorkspaces", "vtosa"),
    ("Operator/WorkspaceStatus", "vtosa"),
    ("Operator/ListConflicts", "vtosa"),
    ("Operator/ListTasks", "vtosa"),
    ("Operator/GetTask", "vtosa"),
    ("Operator/WaitTask", "vtosa"),
    ("Operator/ReadTask", "vtosa"),
    ("Operator/ReadHistory", "vtosa"),
    ("Operator/Exec", "tosa"),
    ("Operator/CancelTask", "tosa"),
    ("Operator/LabelNode", "osa"),
    ("Operator/RenameNode", "osa"),
    ("Operator/CordonNode", "osa"),
    ("Operator/CreateWorkspace", "osa"),
    ("Operator/AttachWorkspace", "osa"),
    ("Operator/DetachWorkspace", "osa"),
    ("Operator/ConfirmDeletes", "osa"),
    ("Operator/RevokeNode", "sa"),
    ("Operator/ForgetNode", "sa"),
    ("Operator/SetNodePolicy", "sa"),
    ("Operator/ListOperators", "a"),
    ("Operator/RevokeOperator", "a"),
    ("Operator/CreateOperator", "a"),
    ("Operator/CreateInvite", "a"),
    ("Operator/ListInvites", "a"),
    ("Operator/RevokeInvite", "a"),
    ("Operator/ListAudit", "a"),
    ("Operator/VerifyAudit", "a"),
    ("Operator/CaStatus", "a"),
    ("Operator/RotateCa", "a"),
];

/// Whether the caller of this letter may call the method of this path.
pub(crate) fn may_call(path: &str, letter: char) -> bool {
    let method = path.strip_prefix("/cortex.v1.").unwrap();
    let found = EXPECTED.iter().find(|(expected, _)| *expected == method);
    found.unwrap_or_else(|| panic!("{path} is not written down")).1.contains(letter)
}
