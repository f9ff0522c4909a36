// Output of commands, as text. Whatever a command writes to steer a terminal (colours, cursor, titles, the
// clipboard, links) is taken out and never carried out; a line that is written anew over itself, as progress
// bars are, is shown as it stands last.
import { visible } from "./dom.js";

// A sequence that never ends must not hide what follows.
const LONGEST_SEQUENCE = 4096;
const LONGEST_LINE = 10_000;
// What is kept on the page; the oldest goes first.
const MOST_CHARACTERS = 1_000_000;
const MOST_BLOCKS = 3000;

// Takes control sequences out of a stream of bytes that comes in pieces.
export class Stripper {
  #decoder = new TextDecoder();
  #state = "text";
  #length = 0;

  // The text of a piece; of control characters only \n, \t, \r and \b are left.
  feed(bytes) {
    let text = "";
    for (const character of this.#decoder.decode(bytes, { stream: true })) text += this.#next(character);
    return text;
  }

  #enter(state) {
    this.#state = state;
    this.#length = 0;
    return "";
  }

  #next(character) {
    const code = character.codePointAt(0);
    if (this.#state === "text") return this.#text(character, code);
    this.#length += 1;
    // A new line, a cancel, or too much: it was no sequence after all, or is one no longer.
    if (code === 0x0a || code === 0x18 || code === 0x1a || this.#length > LONGEST_SEQUENCE) {
      this.#enter("text");
      return code === 0x0a ? "\n" : "";
    }
    if (code === 0x1b) return this.#enter(this.#state === "string" ? "string-escape" : "escape");
    switch (this.#state) {
      case "escape":
        if (character === "[") return this.#enter("control");
        if ("]PX^_".includes(character)) return this.#enter("string");
        return code >= 0x20 && code <= 0x2f ? "" : this.#enter("text");
      case "control":
        if (code >= 0x20 && code <= 0x3f) return "";
        this.#enter("text");
        return code >= 0x40 && code <= 0x7e ? "" : this.#text(character, code);
      case "string-escape":
        if (character === "\\") return this.#enter("text");
        this.#state = "escape";
        return this.#next(character);
      default: // string
        return code === 0x07 || code === 0x9c ? this.#enter("text") : "";
    }
  }

  #text(character, code) {
    if (code === 0x1b) return this.#enter("escape");
    if (code === 0x9b) return this.#enter("control");
    if ([0x90, 0x98, 0x9d, 0x9e, 0x9f].includes(code)) return this.#enter("string");
    if ("\n\t\r\b".includes(character)) return character;
    return code < 0x20 || (code >= 0x7f && code <= 0x9f) ? "" : visible(character);
  }
}

// The lines of one stream: what stands, and the line that is being written.
class Lines {
  #line = [];
  #column = 0;

  // Whole lines that this adds.
  feed(text) {
    let done = "";
    for (const character of text) {
      if (character === "\r") {
        this.#column = 0;
      } else if (character === "\b") {
        this.#column = Math.max(0, this.#column - 1);
      } else if (character === "\n" || this.#column >= LONGEST_LINE) {
        done += `${this.open}\n`;
        this.#line = [];
        this.#column = 0;
        if (character !== "\n") this.#line[this.#column++] = character;
      } else {
        this.#line[this.#column++] = character;
      }
    }
    return done;
  }

  get open() {
    return this.#line.join("");
  }

  // Ends the line that is being written, and gives it.
  take() {
    const line = this.open;
    this.#line = [];
    this.#column = 0;
    return line;
  }
}

// A place that output is written to, block by block; a block is what one stream wrote in one go.
export class Terminal {
  #place;
  #streams = new Map();
  #last = null;
  #characters = 0;

  constructor(place) {
    this.#place = place;
  }

  get empty() {
    return !this.#place.firstChild;
  }

  clear() {
    this.#place.replaceChildren();
    this.#last = null;
    this.#characters = 0;
  }

  // A remark of the page's own, between outputs.
  note(...content) {
    const note = document.createElement("p");
    note.className = "note";
    note.append(...content);
    this.#close();
    this.#add(note);
  }

  // What a stream wrote; `key` says which.
  write(key, kind, bytes) {
    const follow = this.#atEnd();
    let stream = this.#streams.get(key);
    if (!stream) {
      // A stream that was forgotten and goes on begins as text: at worst the rest of a sequence is shown.
      if (this.#streams.size >= 64) this.#streams.delete(this.#streams.keys().next().value);
      stream = { stripper: new Stripper(), lines: new Lines() };
      this.#streams.set(key, stream);
    }
    if (this.#last?.key !== key) {
      this.#close();
      const block = document.createElement("pre");
      block.className = kind === "stderr" ? "stderr" : "stdout";
      const [done, open] = [new Text(), new Text()];
      block.append(done, open);
      this.#last = { key, block, done, open };
      this.#add(block);
    }
    const done = stream.lines.feed(stream.stripper.feed(bytes));
    this.#last.done.appendData(done);
    this.#last.open.data = stream.lines.open;
    this.#characters += done.length;
    this.#trim();
    if (follow) this.toEnd();
  }

  toEnd() {
    this.#place.scrollTop = this.#place.scrollHeight;
  }

  // Ends the block that is being written; a line that goes on later begins anew there.
  #close() {
    if (!this.#last) return;
    const line = this.#streams.get(this.#last.key)?.lines.take() ?? "";
    this.#last.open.remove();
    this.#last.done.appendData(line);
    this.#characters += line.length;
    this.#last = null;
  }

  #atEnd() {
    const { scrollTop, clientHeight, scrollHeight } = this.#place;
    return scrollTop + clientHeight >= scrollHeight - 24;
  }

  #add(element) {
    const follow = this.#atEnd();
    this.#place.append(element);
    if (follow) this.toEnd();
  }

  #trim() {
    const place = this.#place;
    while (place.childElementCount > 1 &&
      (this.#characters > MOST_CHARACTERS || place.childElementCount > MOST_BLOCKS)) {
      this.#characters -= place.firstChild.textContent.length;
      place.firstChild.remove();
    }
    const excess = this.#characters - MOST_CHARACTERS;
    if (excess > 0 && this.#last) {
      this.#last.done.deleteData(0, excess);
      this.#characters -= excess;
    }
  }
}

export function fromBase64(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}
