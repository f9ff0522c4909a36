// What a node's commands wrote, and go on writing.
import { Problem, now } from "./api.js";
import { el } from "./dom.js";
import { bytes as size, clock } from "./format.js";
import { listen } from "./live.js";
import { keepAsking, once, taskLink } from "./parts.js";
import { Terminal, fromBase64 } from "./terminal.js";

const EVERY_MS = 1000;
const AFTER_TROUBLE_MS = 5000;
// While nothing runs: for what nobody told.
const SELDOM_MS = 30_000;
// How long after an event output may still be on its way.
const AFTERWARDS_MS = 5000;
const LINES = 500;

// A panel with a terminal in it, and buttons to hold it.
export function terminalPanel(title, key) {
  const place = el("div", { class: "terminal", role: "log", tabindex: 0, "aria-label": title });
  const said = el("span", { class: "quiet", role: "status" });
  const end = el("button", { type: "button", onclick: () => terminal.toEnd() }, "To the end");
  const panel = el("section", { class: "output", "data-keep": key, "data-key": key },
    el("div", { class: "head" }, el("h2", {}, title), said, end), place);
  const terminal = new Terminal(place);
  return { panel, place, terminal, end, say: (text) => { said.textContent = text; } };
}

// What the commands of a node wrote, and write: asked for every second while one runs, and for a moment after
// something has happened there; seldom otherwise.
export function history(context, name) {
  const { panel, terminal, end, say } = terminalPanel("Output", "history");
  let [paused, cursor, task] = [false, null, null];
  let [running, until, woken] = [true, 0, new AbortController()];
  const wake = () => {
    until = Date.now() + AFTERWARDS_MS;
    woken.abort();
  };
  const pause = el("button", { type: "button", "aria-pressed": "false", onclick: () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    pause.textContent = paused ? "Go on" : "Hold";
    say(paused ? "held" : "live");
    wake();
  } }, "Hold");
  end.before(pause);

  const write = (piece) => {
    if (piece.skipped_bytes) terminal.note(`${size(piece.skipped_bytes)} are not kept`);
    if (piece.task_id !== task) {
      task = piece.task_id;
      terminal.note(clock(piece.at_ms), " ", task ? taskLink(task) : "");
    }
    terminal.write(`${task} ${piece.stream}`, piece.stream, fromBase64(piece.data));
  };

  keepAsking(context.signal, async () => {
    woken = new AbortController();
    const ended = woken.signal;
    if (!paused) {
      const range = cursor === null ? `lines=${LINES}` : `cursor=${cursor}`;
      try {
        const page = await context.get(`/nodes/${context.part(name)}/history?limit=1000&${range}`);
        if (context.signal.aborted) return 0;
        if (!paused) {
          if (page.next_cursor !== cursor) page.pieces.forEach(write);
          cursor = page.next_cursor;
          say(terminal.empty ? "live; nothing was written yet" : "live");
          if (page.more) return 0;
        }
      } catch (error) {
        if (!context.signal.aborted) say(`not live: ${Problem.of(error).detail}`);
        return AFTER_TROUBLE_MS;
      }
    }
    const soon = !paused && (running || !context.live() || Date.now() < until);
    await once(context.signal, ended, soon ? EVERY_MS : SELDOM_MS);
    return 0;
  });
  return { panel, wake, running: (now) => { running = now; } };
}

// What is kept of one task's output, and what comes: by a stream of its own, and asked for every second where
// there is none.
export function taskOutput(context, id) {
  const { panel, terminal, say } = terminalPanel("Output", "output");
  const next = { stdout: 0, stderr: 0 };
  let [streams, woken] = [false, new AbortController()];
  const over = new AbortController();
  context.signal.addEventListener("abort", () => over.abort(), { once: true });
  const place = () => `?stdout_offset=${next.stdout}&stderr_offset=${next.stderr}`;
  const live = () => say(terminal.empty ? "live; nothing was written yet" : "live");

  const write = ({ stream, offset, data }) => {
    const bytes = fromBase64(data);
    const known = Math.max(0, next[stream] - offset);
    if (known >= bytes.length) return;
    if (offset > next[stream]) terminal.note(`${size(offset - next[stream])} are not kept`);
    terminal.write(stream, stream, bytes.subarray(known));
    next[stream] = offset + bytes.length;
  };
  // It ended: nothing comes any more.
  const end = (task) => {
    say(terminal.empty ? "it wrote nothing, or nothing of it is kept" : `ended at ${clock(task.ended_at_ms ?? now())}`);
    over.abort();
  };

  listen(over.signal, () => `/tasks/${context.part(id)}/output/stream${place()}`, {
    changed: (up) => {
      streams = up;
      if (up) live();
      woken.abort();
    },
    told: ({ output, task }) => {
      if (output) write(output);
      if (task) end(task);
      else live();
    },
  });
  keepAsking(over.signal, async () => {
    woken = new AbortController();
    const ended = woken.signal;
    if (streams) {
      await once(over.signal, ended, SELDOM_MS);
      return 0;
    }
    try {
      const page = await context.get(`/tasks/${context.part(id)}/output${place()}`);
      if (over.signal.aborted) return 0;
      page.pieces.forEach(write);
      next.stdout = Math.max(next.stdout, page.next_stdout_offset);
      next.stderr = Math.max(next.stderr, page.next_stderr_offset);
      if (page.task?.end) return end(page.task), 0;
      live();
      await once(over.signal, ended, page.task ? EVERY_MS : 0);
    } catch (error) {
      if (!over.signal.aborted) say(`not live: ${Problem.of(error).detail}`);
      await once(over.signal, ended, AFTER_TROUBLE_MS);
    }
    return 0;
  });
  return panel;
}
