// Where a login link leads. The code stands behind the `#`, which browsers do not send: it is posted from
// here, so that a preview of the link does not use it up.
import { Problem, send } from "./api.js";

const message = document.getElementById("message");
const hint = document.getElementById("hint");

async function logIn() {
  const code = location.hash.slice(1);
  // The code is good once; it need not stand in the browser's history.
  history.replaceState(null, "", location.pathname);
  if (!code) {
    message.textContent = "A login link is needed. Get one with:";
    hint.textContent = "cortex-agent login-link";
    return;
  }
  try {
    const session = await send("POST", "/session", { code });
    message.textContent = `Logged in as ${session.name}.`;
    location.replace("/");
  } catch (error) {
    const problem = Problem.of(error);
    message.textContent = problem.detail;
    hint.textContent = problem.hint ?? problem.code;
  }
}

// A second link may be pasted into the same tab, which loads nothing anew.
addEventListener("hashchange", () => location.hash && logIn());
logIn();
