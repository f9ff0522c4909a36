// Asking the hub's API. What it refuses is a Problem, which says what helps.

export const ROOT = "/api/v1";
const PATIENCE_MS = 20_000;
// Answers that are kept to be asked for with their tag; the oldest goes first.
const KEPT = 40;

export class Problem extends Error {
  constructor(document) {
    super(document.detail);
    Object.assign(this, document);
  }

  // Whatever went wrong, as a problem.
  static of(error) {
    if (error instanceof Problem) return error;
    if (error.name === "TimeoutError") {
      return new Problem({ code: "no_answer", detail: "The hub did not answer in time." });
    }
    // What fetch throws has no more to say than that there is no connection.
    if (error instanceof TypeError) {
      const detail = "The hub cannot be reached.";
      return new Problem({ code: "unreachable", detail, hint: "this page tries again by itself" });
    }
    return new Problem({ code: "page", detail: `This page failed: ${error.message}` });
  }

  // Whether trying again by itself makes sense.
  get passing() {
    return ["no_answer", "unreachable"].includes(this.code) || this.status >= 500 || this.status === 429;
  }
}

const kept = new Map();
let skewMs = 0;

// The hub's time: that of a phone may be wrong, and what is counted down here ends at the hub's.
export function now() {
  return Date.now() + skewMs;
}

async function ask(path, options, signal) {
  const patience = AbortSignal.timeout(PATIENCE_MS);
  const response = await fetch(ROOT + path, {
    ...options,
    cache: "no-store",
    credentials: "same-origin",
    redirect: "error",
    signal: signal ? AbortSignal.any([signal, patience]) : patience,
  });
  const date = Date.parse(response.headers.get("date") ?? "");
  // The header is cut to the second: only more than that is a difference.
  if (date) skewMs = Math.abs(date + 500 - Date.now()) > 1500 ? date + 500 - Date.now() : 0;
  if (response.ok || response.status === 304) return response;
  throw new Problem(await problemOf(response));
}

async function problemOf(response) {
  const unknown = { status: response.status, code: "unknown", detail: `The hub answered ${response.status}.` };
  const kind = response.headers.get("content-type") ?? "";
  if (!kind.startsWith("application/problem+json")) return unknown;
  return response.json().catch(() => unknown);
}

// What is at a path. The same object as before, if nothing has changed.
export async function get(path, signal) {
  const before = kept.get(path);
  const headers = before ? { "if-none-match": before.tag } : {};
  const response = await ask(path, { headers }, signal);
  if (response.status === 304 && before) return before.value;
  const value = await response.json();
  const tag = response.headers.get("etag");
  kept.delete(path);
  if (tag) kept.set(path, { tag, value });
  if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  return value;
}

// Changes something.
export async function send(method, path, body) {
  const json = body === undefined ? {} : {
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  };
  const response = await ask(path, { method, ...json });
  return response.json();
}

// A part of a path or query.
export const part = encodeURIComponent;
