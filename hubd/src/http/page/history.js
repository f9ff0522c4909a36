// What a node's commands wrote, and go on writing.
import { Problem, now } from "./api.js";
import { el } from "./dom.js";
import { bytes, clock } from "./format.js";
import { keepAsking, taskLink } from "./parts.js";
import { Terminal, fromBase64 } from "./terminal.js";

const EVERY_MS = 1000;
const AFTER_TROUBLE_MS = 5000;
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

export function history(context, name) {
  const { panel, terminal, end, say } = terminalPanel("Output", "history");
  let [paused, cursor, task] = [false, null, null];
  const pause = el("button", { type: "button", "aria-pressed": "false", onclick: () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    pause.textContent = paused ? "Go on" : "Hold";
    say(paused ? "held" : "live");
  } }, "Hold");
  end.before(pause);

  const write = (piece) => {
    if (piece.skipped_bytes) terminal.note(`${bytes(piece.skipped_bytes)} are not kept`);
    if (piece.task_id !== task) {
      task = piece.task_id;
      terminal.note(clock(piece.at_ms), " ", task ? taskLink(task) : "");
    }
    terminal.write(`${task} ${piece.stream}`, piece.stream, fromBase64(piece.data));
  };

  keepAsking(context.signal, async () => {
    if (paused) return EVERY_MS;
    const range = cursor === null ? `lines=${LINES}` : `cursor=${cursor}`;
    try {
      const page = await context.get(`/nodes/${context.part(name)}/history?limit=1000&${range}`);
      if (paused || context.signal.aborted) return EVERY_MS;
      if (page.next_cursor !== cursor) page.pieces.forEach(write);
      cursor = page.next_cursor;
      say(terminal.empty ? "live; nothing was written yet" : "live");
      return page.more ? 0 : EVERY_MS;
    } catch (error) {
      if (!context.signal.aborted) say(`not live: ${Problem.of(error).detail}`);
      return AFTER_TROUBLE_MS;
    }
  });
  return panel;
}

// What is kept of one task's output, and what comes.
export function taskOutput(context, id) {
  const { panel, terminal, say } = terminalPanel("Output", "output");
  const next = { stdout: 0, stderr: 0 };
  keepAsking(context.signal, async () => {
    const path = `/tasks/${context.part(id)}/output?stdout_offset=${next.stdout}&stderr_offset=${next.stderr}`;
    try {
      const page = await context.get(path);
      if (context.signal.aborted) return 0;
      for (const piece of page.pieces) {
        const data = fromBase64(piece.data);
        // Asked again with the same offsets, the same answer has nothing new.
        if (piece.offset + data.length <= next[piece.stream]) continue;
        if (piece.offset > next[piece.stream]) terminal.note(`${bytes(piece.offset - next[piece.stream])} are not kept`);
        terminal.write(piece.stream, piece.stream, data);
        next[piece.stream] = piece.offset + data.length;
      }
      next.stdout = Math.max(next.stdout, page.next_stdout_offset);
      next.stderr = Math.max(next.stderr, page.next_stderr_offset);
      if (!page.task) return 0;
      if (page.task.end) {
        say(terminal.empty ? "it wrote nothing, or nothing of it is kept" : `ended at ${clock(page.task.ended_at_ms ?? now())}`);
        // It ended: nothing comes any more. Only leaving the view ends the asking.
        return 3_600_000;
      }
      say(terminal.empty ? "live; nothing was written yet" : "live");
      return EVERY_MS;
    } catch (error) {
      if (!context.signal.aborted) say(`not live: ${Problem.of(error).detail}`);
      return AFTER_TROUBLE_MS;
    }
  });
  return panel;
}
