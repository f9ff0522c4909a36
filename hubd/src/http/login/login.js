"use strict";

(async () => {
  const message = document.getElementById("message");
  const code = location.hash.slice(1);
  // The code is good once; it need not stand in the browser's history.
  history.replaceState(null, "", location.pathname);
  if (!code) {
    message.textContent = "Get a link: cortex-agent login-link";
    return;
  }
  try {
    const answer = await fetch("/api/v1/session", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ code }),
    });
    const said = await answer.json();
    if (!answer.ok) {
      message.textContent = `${said.detail} (${said.hint || said.code})`;
      return;
    }
    message.textContent = `Logged in as ${said.name}.`;
    location.replace("/");
  } catch (error) {
    message.textContent = `The hub did not answer: ${error.message}`;
  }
})();
