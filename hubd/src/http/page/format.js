// Values as people read them.
import { now } from "./api.js";
import { el } from "./dom.js";

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

export function bytes(count) {
  let unit = 0;
  for (; count >= 1024 && unit < UNITS.length - 1; unit += 1) count /= 1024;
  return `${unit && count < 10 ? count.toFixed(1) : Math.round(count)} ${UNITS[unit]}`;
}

// A time span in its two largest units.
export function span(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  const [days, hours, minutes] =
    [Math.floor(seconds / 86_400), Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  if (minutes) return `${minutes} min ${seconds % 60} s`;
  return `${seconds} s`;
}

const whole = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
const hour = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });

export const date = (ms) => whole.format(ms);
export const clock = (ms) => hour.format(ms);

function words(kind, ms) {
  if (kind === "since") return span(now() - ms);
  if (kind === "until") return span(ms - now());
  const past = now() - ms;
  return past < 2000 ? "now" : `${span(past)} ago`;
}

// A time that keeps counting: kind is ago, since or until.
export function counting(kind, ms) {
  if (!ms) return "never";
  const machine = new Date(ms).toISOString();
  return el("time", { "data-kind": kind, "data-ms": ms, datetime: machine, title: date(ms) }, words(kind, ms));
}

// Counts on, everywhere on the page.
export function tick() {
  for (const time of document.querySelectorAll("time[data-kind]")) {
    const text = words(time.dataset.kind, Number(time.dataset.ms));
    if (time.textContent !== text) time.textContent = text;
  }
}

// `1 node`, `3 nodes`.
export const count = (number, thing) => `${number} ${thing}${number === 1 ? "" : "s"}`;
