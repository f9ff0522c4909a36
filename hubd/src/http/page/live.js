// Streams of the hub's: what happens, told as it happens. One is open only while somebody can see the page,
// so that a page nobody looks at keeps no login in use. A stream that breaks, or cannot be had, is asked for
// again; whoever relies on it asks for the state of things meanwhile.
import { ROOT } from "./api.js";

const AGAIN_MS = 3000;

// Listens until the signal ends it. `address` says where, and is asked anew for each attempt with the id of
// the last piece that came; `told` gets what is told; `changed` hears whether anything is told at the moment.
export function listen(signal, address, { told, changed }) {
  let [source, last, timer, up] = [null, null, 0, false];
  const set = (now) => {
    if (now !== up && !signal.aborted) changed(up = now);
  };
  const close = () => {
    clearTimeout(timer);
    source?.close();
    source = null;
  };
  const open = () => {
    close();
    if (signal.aborted || document.hidden || !globalThis.EventSource) return set(false);
    source = new EventSource(ROOT + address(last));
    source.onopen = () => set(true);
    source.onmessage = (piece) => {
      last = piece.lastEventId;
      told(JSON.parse(piece.data));
    };
    // Why a stream ended, the next question is told as well.
    source.onerror = () => {
      close();
      timer = setTimeout(open, AGAIN_MS);
      set(false);
    };
  };
  document.addEventListener("visibilitychange", open, { signal });
  signal.addEventListener("abort", close, { once: true });
  open();
}
