// Which view is shown, who looks at it, and asking for what is new. Views are named by what stands behind
// the `#`, so that every one has an address.
import { Problem, get, part, send } from "./api.js";
import { el, show } from "./dom.js";
import { count, counting, tick } from "./format.js";
import { listen } from "./live.js";
import { nodeView, nodesView } from "./nodes.js";
import { badge, empty, keepAsking, once, problem } from "./parts.js";
import { taskView, tasksView } from "./tasks.js";
import { workspaceView, workspacesView } from "./workspaces.js";

const VIEWS = [
  [/^#\/nodes$/, nodesView],
  [/^#\/nodes\/([^/]+)$/, nodeView],
  [/^#\/tasks$/, tasksView],
  [/^#\/tasks\/([^/]+)$/, taskView],
  [/^#\/workspaces$/, workspacesView],
  [/^#\/workspaces\/([^/]+)$/, workspaceView],
];
const PLACES = [["Nodes", "#/nodes"], ["Tasks", "#/tasks"], ["Workspaces", "#/workspaces"]];
// How often the page asks while nobody tells it what happens.
const EVERY_MS = 2000;
// And while somebody does: for what no event says.
const SELDOM_MS = 30_000;
// Many events at once are one reason to ask.
const GAP_MS = 300;
// What the foot of the page counts.
const COUNTED = /^(node|task)\./;
// How long the page waits before it asks a hub again that did not answer.
const AFTER_TROUBLE_MS = 3000;

const place = (id) => document.getElementById(id);
const content = place("content");
let session = null;
// What ends the view that is shown.
let leave = new AbortController();
// What ends the listening, whether anything is told, and what the view makes of it.
let deaf = new AbortController();
let live = false;
// What the foot of the page shows of the hub.
let counted = null;
let hear = () => {};

function bar() {
  const at = location.hash;
  show(place("nav"), session && PLACES.map(([text, href]) =>
    el("a", { href, "aria-current": at.startsWith(href) ? "page" : null }, text)));
  show(place("who"), session && [
    el("span", { class: "quiet" }, session.name, " · ", session.role),
    el("button", { type: "button", onclick: logOut }, "Log out"),
  ]);
}

function foot(hub) {
  counted = hub;
  show(place("foot"), hub && [
    el("span", {}, "hub ", hub.version), el("span", {}, "up ", counting("since", hub.started_at_ms)),
    el("span", {}, `${hub.nodes_online} of ${count(hub.nodes_known, "node")} online`),
    el("span", {}, `${hub.running_tasks} running`),
    el("span", { class: "mono" }, "mesh ", hub.mesh_id),
    el("span", { id: "live" }, live ? "live" : `asks every ${EVERY_MS / 1000} s`),
  ]);
}

function notice(error, since) {
  content.classList.toggle("stale", Boolean(error));
  show(place("notice"), error && el("p", { class: "trouble" },
    badge("bad", "not live"), " ", Problem.of(error).detail, " What is shown is ",
    counting("ago", since).textContent === "now" ? "a moment old." : ["from ", counting("ago", since), "."]));
}

async function logOut() {
  try {
    await send("DELETE", "/session");
    loggedOut("You are logged out.");
  } catch (error) {
    if (Problem.of(error).status === 401) loggedOut("You are logged out.");
    else notice(error, Date.now());
  }
}

function loggedOut(why) {
  leave.abort();
  deaf.abort();
  live = false;
  session = null;
  bar();
  foot(null);
  notice(null);
  document.title = "cortex mesh: log in";
  show(content, el("section", { class: "door" },
    el("h1", {}, "Log in"), el("p", {}, why),
    el("p", {}, "There are no passwords here. Ask for a link and open it in this browser:"),
    el("pre", { class: "mono" }, "cortex-agent login-link"),
    el("p", { class: "quiet" }, "On the hub's own machine, its administrator asks with:"),
    el("pre", { class: "mono" }, "cortex-hubd login-link"),
    el("button", { type: "button", onclick: begin }, "I have logged in")));
}

// Shows the view of the address, until another is wanted.
async function go() {
  leave.abort();
  if (!session) return;
  const ending = new AbortController();
  leave = ending;
  const { signal } = ending;
  const address = location.hash;
  const found = VIEWS.map(([pattern, view]) => [address.match(pattern), view]).find(([match]) => match);
  if (!found) return location.replace("#/nodes");
  let names;
  try {
    names = found[0].slice(1).map(decodeURIComponent);
  } catch {
    return location.replace("#/nodes");
  }
  let wake = new AbortController();
  // Whether the view has to ask anew, and whether somebody waits for that.
  let [stale, hurry] = [true, false];
  const context = {
    session, signal, part,
    get: (path) => get(path, signal),
    live: () => live,
    refresh: () => {
      [stale, hurry] = [true, true];
      wake.abort();
    },
  };
  const view = found[1](context, ...names);
  document.title = `${view.title} · cortex mesh`;
  bar();
  content.replaceChildren(empty("Loading…"));
  scrollTo(0, 0);
  let [shown, answered] = [null, null];
  const render = (data) => show(content, view.render(data));
  context.render = () => shown && render(shown);
  // Without an event: anything may have happened.
  hear = (event) => {
    const touched = !event || "missed" in event || view.touches(event);
    stale ||= touched;
    if (touched) view.told?.();
    if (touched || COUNTED.test(event.kind)) wake.abort();
  };
  const turn = async () => {
    wake = new AbortController();
    const ended = wake.signal;
    const whole = stale || !shown;
    [stale, hurry] = [false, false];
    try {
      const [data, hub] = await Promise.all([whole ? view.load() : shown, context.get("/hub")]);
      if (signal.aborted) return 0;
      answered = Date.now();
      notice(null);
      foot(hub);
      if (!shown || !same(data, shown)) render(shown = data);
    } catch (error) {
      if (signal.aborted) return 0;
      const trouble = Problem.of(error);
      if (trouble.status === 401) return loggedOut("The session is over."), 0;
      if (shown && trouble.passing) notice(trouble, answered);
      else show(content, problem(trouble, () => context.refresh()));
      if (!trouble.passing) shown = null;
      stale = true;
      await once(signal, ended, AFTER_TROUBLE_MS);
      return hurry ? 0 : GAP_MS;
    }
    await once(signal, ended, live ? view.every ?? SELDOM_MS : EVERY_MS);
    if (!ended.aborted) stale = true;
    return hurry || !ended.aborted ? 0 : Math.max(0, answered + GAP_MS - Date.now());
  };
  await keepAsking(signal, turn);
}

// Hears of what happens, from now on and as long as somebody is logged in. What happened before, or while
// nothing was told, is asked for.
function listenToAll() {
  deaf.abort();
  deaf = new AbortController();
  const address = (last) => last ? `/events?after=${last}` : "/events";
  const changed = (up) => {
    live = up;
    foot(counted);
    hear(null);
  };
  listen(deaf.signal, address, { told: (event) => hear(event), changed });
}

// Whether every part of an answer is the one from before.
function same(fresh, old) {
  const names = Object.keys(fresh);
  return names.length === Object.keys(old).length && names.every((name) => fresh[name] === old[name]);
}

async function begin() {
  try {
    session = await get("/session");
  } catch (error) {
    const trouble = Problem.of(error);
    if (trouble.status === 401) return loggedOut("You are not logged in.");
    show(content, problem(trouble, begin));
    // A hub that starts is soon there.
    if (trouble.passing) setTimeout(begin, AFTER_TROUBLE_MS);
    return;
  }
  listenToAll();
  go();
}

place("skip").onclick = (event) => {
  event.preventDefault();
  content.focus();
};
addEventListener("hashchange", () => {
  go();
  content.focus({ preventScroll: true });
});
setInterval(tick, 1000);
begin();
