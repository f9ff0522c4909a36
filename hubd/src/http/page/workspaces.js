// Workspaces: how far their members are, and what two of them changed at once.
import { el } from "./dom.js";
import { bytes, count, counting, span } from "./format.js";
import { badge, empty, facts, mono, nodeLink, table, workspaceLink } from "./parts.js";

const MOST = 1000;
const CHANGES = 30;
// How far members are is no event: it changes all the time.
const EVERY_MS = 2000;
const ABOUT = /^(workspace\.|node\.(online|offline|renamed))/;

const sum = (items, of) => items.reduce((total, item) => total + of(item), 0);
const behind = (workspace) => workspace.members.filter((member) => member.applied_seq < workspace.head_seq);
const conflicts = (workspace) => Math.max(0, ...workspace.members.map((member) => member.status?.conflicts ?? 0));
const problems = (workspace) => sum(workspace.members, (member) => member.status?.problems.length ?? 0);

function state(workspace) {
  const { members } = workspace;
  if (members.some((member) => member.status?.state === "halted")) return badge("bad", "halted");
  if (sum(members, (member) => member.status?.held_deletions ?? 0)) return badge("warn", "deletions held");
  if (conflicts(workspace)) return badge("warn", "conflicts");
  if (problems(workspace)) return badge("warn", "problems");
  if (!members.length) return badge("quiet", "no members");
  const late = behind(workspace).length;
  return late ? badge("busy", `${late} of ${members.length} behind`) : badge("good", "in step");
}

function progress(member, head) {
  const { status } = member;
  if (!member.online) return badge("off", "offline");
  if (!status) return badge("off", "not heard yet");
  const tone = { idle: "good", halted: "bad", paused: "warn", offline: "off", unknown: "off" }[status.state] ?? "busy";
  const rest = status.bytes_total > status.bytes_done;
  return [
    badge(tone, status.state === "idle" && member.applied_seq >= head ? "in step" : status.state),
    rest && [" ", el("progress", { max: status.bytes_total, value: status.bytes_done, "aria-label": "bytes" }),
      el("span", { class: "quiet" }, ` ${bytes(status.bytes_done)} of ${bytes(status.bytes_total)}`,
        status.bytes_per_second > 0 && `, ${bytes(status.bytes_per_second)}/s`,
        status.eta_ms > 0 && `, ${span(status.eta_ms)} left`)],
  ];
}

export function workspacesView(context) {
  const columns = ["Workspace", "State", "Version", "Files", "Size", "Members", "Conflicts"];
  const row = (workspace) => ({
    key: workspace.workspace_id,
    cells: [
      workspaceLink(workspace.name), state(workspace), mono(workspace.head_seq), mono(workspace.entries), bytes(workspace.content_bytes),
      workspace.members.length ? workspace.members.map((member, at) => [at > 0 && ", ", nodeLink(member.node_name)]) : el("span", { class: "quiet" }, "none"),
      conflicts(workspace) ? mono(conflicts(workspace)) : el("span", { class: "quiet" }, "0"),
    ],
  });
  return {
    title: "Workspaces",
    every: EVERY_MS,
    touches: ({ kind }) => ABOUT.test(kind),
    load: async () => ({ page: await context.get(`/workspaces?limit=${MOST}`) }),
    render: ({ page }) => [
      el("h1", {}, "Workspaces"),
      page.workspaces.length ? table(count(page.workspaces.length, "workspace"), columns, page.workspaces.map(row))
        : empty("There are no workspaces yet. Make one: ", mono("cortex-agent workspace create NAME")),
      page.next_cursor && el("p", { class: "quiet" }, `These are the first ${MOST}.`),
    ],
  };
}

function remarks(member, name) {
  const { status } = member;
  if (!status) return null;
  return [
    status.halted_reason && el("p", { class: "trouble" }, status.halted_reason),
    status.held_deletions > 0 && el("p", { class: "trouble" }, `${count(status.held_deletions, "deletion")} held for somebody's word: `, mono(`cortex-agent workspace confirm-deletes ${name}`)),
    status.pending_push > 0 && el("p", {}, `${count(status.pending_push, "change")} not at the hub yet`),
    status.problems.length > 0 && el("details", {},
      el("summary", {}, count(status.problems.length, "path"), " behind"),
      el("ul", {}, status.problems.map((trouble) => el("li", {}, mono(trouble.path), ": ", trouble.message, " ", el("span", { class: "quiet" }, trouble.code))))),
  ];
}

export function workspaceView(context, name) {
  const path = `/workspaces/${context.part(name)}`;
  return {
    title: name,
    every: EVERY_MS,
    touches: (event) => ABOUT.test(event.kind) && (!event.workspace || event.workspace === name),
    load: async () => {
      const [details, open, log] = await Promise.all([
        context.get(path), context.get(`${path}/conflicts`), context.get(`${path}/log?limit=${CHANGES}`),
      ]);
      return { details, open, log };
    },
    render: ({ details, open, log }) => {
      const { workspace } = details;
      const members = workspace.members.map((member) => ({
        key: member.node_id,
        cells: [
          nodeLink(member.node_name), progress(member, workspace.head_seq), member.status?.mode ?? "",
          mono(`${member.applied_seq} of ${workspace.head_seq}`), remarks(member, workspace.name),
        ],
      }));
      return [
        el("h1", {}, mono(workspace.name), " ", state(workspace)),
        facts([
          ["Version", mono(workspace.head_seq)], ["Files", mono(workspace.entries)],
          ["Size", bytes(workspace.content_bytes)],
          ["At the hub", `${bytes(details.stored_bytes)}, with ${count(details.old_versions, "old version")}`],
          ["Limit", details.quota_bytes && bytes(details.quota_bytes)],
          ["Old versions", `for ${span(details.keep_for_ms)}, at most ${details.keep_versions} of a path`],
          ["Made", counting("ago", workspace.created_at_ms)],
        ]),
        el("h2", {}, "Members"),
        members.length ? table(count(members.length, "member"), ["Node", "State", "Mode", "Version", "Remarks"], members)
          : empty("No node has it. Attach one: ", mono(`cortex-agent workspace attach ${workspace.name} --node NODE`)),
        el("h2", {}, "Conflicts"),
        open.conflicts.length ? table(`${count(open.conflicts.length, "file")} changed in two places`, ["File", "Copy", "By", "When"],
          open.conflicts.map((conflict) => ({
            key: conflict.copy,
            cells: [mono(conflict.path), mono(conflict.copy), conflict.node ?? "", counting("ago", conflict.at_ms)],
          }))) : empty("None."),
        el("h2", {}, "Latest changes"),
        log.changes.length ? table("newest first", ["Version", "Change", "Path", "By", "When"], log.changes.map(change)) : empty("Nothing changed yet."),
      ];
    },
  };
}

function change(entry) {
  return {
    key: `${entry.seq} ${entry.path}`,
    cells: [
      mono(entry.seq), entry.kind, mono(entry.path), entry.operator ?? entry.node ?? "",
      entry.at_ms ? counting("ago", entry.at_ms) : "",
    ],
  };
}
