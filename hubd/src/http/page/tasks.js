// Tasks, and one of them with its output.
import { send } from "./api.js";
import { el } from "./dom.js";
import { bytes, count, counting, date, span } from "./format.js";
import { taskOutput } from "./history.js";
import { badge, empty, facts, may, mono, nodeLink, question, table, taskLink, workspaceLink } from "./parts.js";

const PAGE = 100;
const MOST = 1000;
const OPEN = ["accepted", "running", "interrupted"];
const STATES = ["accepted", "running", "interrupted", "finished", "failed", "cancelled"];

function state(task) {
  const { end } = task;
  if (task.state === "running") return badge("good", task.cancel_pending ? "being cancelled" : "running");
  if (task.state === "interrupted") return badge("warn", "interrupted");
  if (task.state === "failed") return badge("bad", end?.verdict.replaceAll("_", " ") ?? "failed");
  if (task.state === "cancelled") return badge("quiet", "cancelled");
  if (end?.exit_code) return badge("warn", `exit ${end.exit_code}`);
  if (end?.signal) return badge("warn", `signal ${end.signal}`);
  return badge("quiet", task.state === "finished" ? "exit 0" : task.state);
}

// How long it ran, or has been running.
function lasted(task) {
  if (task.end) return span(task.end.duration_ms);
  return task.started_at_ms ? counting("since", task.started_at_ms) : "";
}

export function taskTable(context, caption, tasks, withNode = true) {
  const columns = ["Task", "State", withNode && "Node", "Command", "By", "Ran", "When"].filter(Boolean);
  const rows = tasks.map((task) => ({
    key: task.task_id,
    cells: [
      taskLink(task.task_id), state(task), withNode && nodeLink(task.node),
      [el("span", { class: "command mono" }, task.command), task.mode === "permissive" && [" ", badge("warn", "PERMISSIVE")]],
      task.actor, lasted(task), counting("ago", task.accepted_at_ms),
    ].filter((cell) => cell !== false),
  }));
  return table(caption, columns, rows);
}

export function tasksView(context) {
  const wanted = { state: "", node: "", mine: false, limit: PAGE };
  const query = () => `/tasks?limit=${wanted.limit}` +
    (wanted.state && `&state=${wanted.state}`) +
    (wanted.node && `&node=${context.part(wanted.node)}`) +
    (wanted.mine ? "&mine=true" : "");
  const change = (name, value) => {
    wanted[name] = value;
    wanted.limit = name === "limit" ? value : PAGE;
    context.refresh();
  };
  const filter = el("form", { class: "filter", role: "search", "data-key": "filter", "data-keep": "filter", onsubmit: (event) => event.preventDefault() },
    el("label", { for: "state" }, "State"),
    el("select", { id: "state", onchange: (event) => change("state", event.target.value) },
      el("option", { value: "" }, "all"), el("option", { value: OPEN.join(",") }, "not ended"),
      STATES.map((word) => el("option", { value: word }, word))),
    el("label", { for: "node" }, "Node"),
    el("input", { id: "node", type: "search", placeholder: "name", autocomplete: "off", spellcheck: "false", onchange: (event) => change("node", event.target.value.trim()) }),
    el("label", { for: "mine" }, "Mine"),
    el("input", { id: "mine", type: "checkbox", onchange: (event) => change("mine", event.target.checked) }));
  let missing = null;
  return {
    title: "Tasks",
    touches: ({ kind }) => kind.startsWith("task.") || kind === "node.renamed",
    load: async () => {
      try {
        missing = null;
        return { page: await context.get(query()) };
      } catch (error) {
        if (!wanted.node || ![400, 404].includes(error.status)) throw error;
        missing = error.detail;
        return { page: { tasks: [] } };
      }
    },
    render: ({ page }) => [
      el("h1", {}, "Tasks"), filter,
      missing ? empty(missing)
        : page.tasks.length ? taskTable(context, `${count(page.tasks.length, "task")}, newest first`, page.tasks)
          : wanted.state || wanted.node || wanted.mine ? empty("No task matches.")
            : empty("Nothing ran yet. Run something: ", mono("cortex-agent exec NODE -- uname -a")),
      page.next_cursor && (wanted.limit < MOST
        ? el("div", { class: "buttons" }, el("button", { type: "button", onclick: () => change("limit", Math.min(MOST, wanted.limit * 3)) }, "Older ones"))
        : el("p", { class: "quiet" }, "Older ones: ", mono("cortex-agent task list"))),
    ],
  };
}

function cancel(context, task) {
  question({
    title: "End this command?",
    text: [task.command, `It is asked to end (SIGTERM), and made to after two seconds.`],
    word: "End it",
    tone: "danger",
    act: async () => {
      await send("POST", `/tasks/${context.part(task.task_id)}/cancel`, {});
      context.refresh();
    },
  });
}

export function taskView(context, id) {
  const output = taskOutput(context, id);
  let whole = null;
  return {
    title: `task ${id.slice(-12)}`,
    touches: ({ task_id: other }) => other && (!whole || other === whole),
    load: async () => {
      const task = await context.get(`/tasks/${context.part(id)}`);
      whole = task.task_id;
      return { task };
    },
    render: ({ task }) => [
      el("h1", {}, "Task ", mono(task.task_id.slice(-12)), " ", state(task)),
      el("pre", { class: "command mono" }, task.command),
      task.end?.reason && el("p", { class: "trouble" }, task.end.reason, task.end.hint && [" ", mono(task.end.hint)]),
      task.interruption && el("p", { class: "trouble" }, task.interruption),
      facts([
        ["Node", nodeLink(task.node)],
        ["By", task.actor],
        ["Mode", task.mode === "permissive" ? badge("warn", "PERMISSIVE") : "STRICT"],
        ["Workspace", task.workspace && workspaceLink(task.workspace)],
        ["Ran", lasted(task)],
        ["Accepted", date(task.accepted_at_ms)],
        ["Ended", task.ended_at_ms && date(task.ended_at_ms)],
        ["Wrote", task.end && `${bytes(task.end.stdout_bytes)}, and ${bytes(task.end.stderr_bytes)} of errors`],
        ["Repeats", task.retry_of && taskLink(task.retry_of)],
        ["Learnt later", task.late_outcome && `${task.late_outcome.verdict} ${task.late_outcome.exit_code ?? ""}`],
        ["Id", mono(task.task_id)],
      ]),
      may.cancel(context.session) && OPEN.includes(task.state) && el("div", { class: "buttons" },
        el("button", { type: "button", class: "danger", disabled: task.cancel_pending, onclick: () => cancel(context, task) }, "End it…")),
      output,
    ],
  };
}
