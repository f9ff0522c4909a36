// Elements out of data. Everything that is shown comes through `el`, and becomes text or an attribute from
// a short list, never markup: names, commands and output are whatever somebody on a node wanted.

const ATTRIBUTES = new Set([
  "class", "id", "href", "title", "type", "name", "value", "placeholder", "for", "scope", "role", "colspan",
  "tabindex", "required", "maxlength", "max", "min", "disabled", "checked", "selected", "open", "datetime",
  "autocomplete", "spellcheck", "rows",
]);
const HANDLERS = ["onclick", "onsubmit", "oninput", "onchange", "onclose"];

// Characters that would turn the text around them, or that nobody sees.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;

export function visible(text) {
  return String(text).replace(HIDDEN, "\ufffd");
}

export function el(name, properties, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (HANDLERS.includes(key)) {
      element[key] = value;
    } else if (ATTRIBUTES.has(key) || key.startsWith("data-") || key.startsWith("aria-")) {
      // A link leads to a view of this page and nowhere else.
      if (key === "href" && !value.startsWith("#")) throw new Error("a foreign link");
      element.setAttribute(key, value === true ? "" : visible(value));
    } else {
      throw new Error(`no attribute ${key}`);
    }
  }
  element.append(...nodes(children));
  return element;
}

function nodes(children) {
  return children.flat(Infinity)
    .filter((child) => child !== null && child !== undefined && child !== false && child !== "")
    .map((child) => child instanceof Node ? child : document.createTextNode(visible(child)));
}

// Makes a place show this, changing no more than what differs: what has the focus, is selected or scrolled
// stays as it is. Elements with `data-key` keep their identity when they move; those with `data-keep` are
// left alone once they are there.
export function show(place, ...children) {
  patchChildren(place, nodes(children));
}

function patchChildren(place, fresh) {
  const keyed = new Map();
  for (const child of place.children) if (child.dataset.key) keyed.set(child.dataset.key, child);
  let at = place.firstChild;
  for (const wanted of fresh) {
    const key = wanted.dataset?.key;
    const found = key ? keyed.get(key) : at?.dataset?.key ? undefined : at;
    if (!found || found.nodeName !== wanted.nodeName) {
      place.insertBefore(wanted, at);
      continue;
    }
    if (key) keyed.delete(key);
    if (found === at) at = at.nextSibling;
    else place.insertBefore(found, at);
    patch(found, wanted);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function patch(old, wanted) {
  if (old === wanted) return;
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.nodeValue !== wanted.nodeValue) old.nodeValue = wanted.nodeValue;
    return;
  }
  if (old.dataset.keep && old.dataset.keep === wanted.dataset.keep) return;
  for (const { name } of [...old.attributes]) {
    // Whether it is unfolded is the reader's.
    if (name !== "open" && !wanted.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const { name, value } of wanted.attributes) {
    if (name !== "open" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  for (const handler of HANDLERS) old[handler] = wanted[handler];
  patchChildren(old, [...wanted.childNodes]);
}
