// Pieces that several views show.
import { Problem } from "./api.js";
import { el } from "./dom.js";

// An error as the hub explains it.
export function problem(error, again) {
  const { title, detail, hint, code, status, error_id: errorId } = Problem.of(error);
  return el("section", { class: "problem", role: "alert" },
    el("h2", {}, title ?? "Something went wrong"),
    el("p", {}, detail),
    hint && el("p", {}, "What helps: ", el("span", { class: "mono" }, hint)),
    el("p", { class: "quiet mono" }, [status, code, errorId && `error id ${errorId}`].filter(Boolean).join(" · ")),
    again && el("button", { type: "button", onclick: again }, "Try again"));
}

export const empty = (...text) => el("p", { class: "empty" }, ...text);

export const mono = (...text) => el("span", { class: "mono" }, ...text);

// A word in a frame. The colour says the same as the word, and nothing alone.
export const badge = (tone, ...text) => el("span", { class: `badge ${tone}` }, ...text);

export const nodeLink = (name) => el("a", { class: "mono", href: `#/nodes/${encodeURIComponent(name)}` }, name);

export const taskLink = (id, text = id.slice(-12)) =>
  el("a", { class: "mono id", href: `#/tasks/${encodeURIComponent(id)}`, title: id }, text);

export const workspaceLink = (name) =>
  el("a", { class: "mono", href: `#/workspaces/${encodeURIComponent(name)}` }, name);

// A table that becomes a list of cards where the screen is narrow: each cell says its column.
export function table(caption, columns, rows) {
  const head = columns.map((name) => el("th", { scope: "col" }, name));
  const body = rows.map(({ key, tone, cells }) =>
    el("tr", { "data-key": key, class: tone },
      cells.map((cell, at) => {
        // One child, beside which a narrow screen puts the column's name; none for a cell that is empty.
        const inner = el("div", {}, cell);
        return el("td", { "data-column": columns[at] }, inner.hasChildNodes() && inner);
      })));
  return el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, head)), el("tbody", {}, body));
}

// Names and values.
export function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== undefined && value !== null && value !== "");
  return el("dl", { class: "facts" }, shown.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

// A question over everything else. `act` does it, and what it throws is shown in its place.
export function question({ title, text, fields = [], word, tone = "", act }) {
  const said = el("div", { role: "alert" });
  const close = () => dialog.close();
  const submit = el("button", { type: "submit", class: tone }, word);
  const form = el("form", {
    onsubmit: async (event) => {
      event.preventDefault();
      submit.disabled = true;
      try {
        await act(new FormData(form));
        close();
      } catch (error) {
        said.replaceChildren(problem(error));
      } finally {
        submit.disabled = false;
      }
    },
  },
  el("h2", { id: "question" }, title), text.map((line) => el("p", {}, line)), fields, said,
  el("div", { class: "buttons" }, el("button", { type: "button", onclick: close }, "Leave it"), submit));
  const dialog = el("dialog", { "aria-labelledby": "question", onclose: () => dialog.remove() }, form);
  document.body.append(dialog);
  dialog.showModal();
}

// Asks on and on until the signal ends it: `turn` answers how long to wait, in milliseconds.
export async function keepAsking(signal, turn) {
  while (!signal.aborted) {
    const wait = await turn();
    await once(signal, null, wait);
    await seen(signal);
  }
}

// Waits this long, and not longer than until one of these signals comes.
export function once(signal, woken, ms) {
  return new Promise((resolve) => {
    const signals = [signal, woken].filter(Boolean);
    if (signals.some((one) => one.aborted)) return resolve();
    const over = new AbortController();
    const stop = () => {
      clearTimeout(timer);
      over.abort();
      resolve();
    };
    const timer = setTimeout(stop, ms);
    // What is over listens to nothing: the signal of a view lives long.
    for (const one of signals) one.addEventListener("abort", stop, { signal: over.signal });
  });
}

// Waits until somebody can see the page.
function seen(signal) {
  return new Promise((resolve) => {
    const look = () => {
      if (!document.hidden || signal.aborted) {
        document.removeEventListener("visibilitychange", look);
        resolve();
      }
    };
    document.addEventListener("visibilitychange", look);
    signal.addEventListener("abort", look, { once: true });
    look();
  });
}

export const may = {
  // The hub decides; what it would refuse is not offered.
  setPolicy: (session) => session.role === "admin",
  cancel: (session) => session.role !== "viewer",
};

