// How much a node's commands may do, and letting them do more, for a reason and a time.
import { send } from "./api.js";
import { el } from "./dom.js";
import { counting } from "./format.js";
import { badge, may, question } from "./parts.js";

const MINUTE = 60_000;
const SPANS = [["15 minutes", 15 * MINUTE], ["30 minutes", 30 * MINUTE], ["1 hour", 60 * MINUTE], ["4 hours", 240 * MINUTE], ["1 day", 1440 * MINUTE]];

// What an unrestricted command would run in at this moment.
export function modeBadge(node) {
  if (node.effective_mode === "strict") return badge("quiet", "STRICT");
  const end = node.policy_until_ms;
  return badge("warn", "PERMISSIVE", end && [" ", counting("until", end)]);
}

function allow(context, node) {
  question({
    title: `PERMISSIVE on ${node.name}`,
    text: ["Commands there will no longer run in the sandbox: they can do whatever the agent's user can. The reason stands in the audit log."],
    fields: [
      el("label", { for: "reason" }, "Reason"),
      el("input", { id: "reason", name: "reason", type: "text", required: true, maxlength: 500, autocomplete: "off" }),
      el("label", { for: "span" }, "For"),
      el("select", { id: "span", name: "span" }, SPANS.map(([text, ms]) => el("option", { value: ms, selected: ms === 30 * MINUTE }, text))),
    ],
    word: "Allow PERMISSIVE",
    tone: "danger",
    act: async (form) => {
      const body = { mode: "permissive", reason: form.get("reason").trim(), for_ms: Number(form.get("span")) };
      await send("PUT", `/nodes/${context.part(node.name)}/policy`, body);
      context.refresh();
    },
  });
}

function end(context, node) {
  question({
    title: `STRICT on ${node.name} again`,
    text: ["New commands run in the sandbox from now on."],
    word: "Back to STRICT",
    act: async () => {
      await send("DELETE", `/nodes/${context.part(node.name)}/policy`);
      context.refresh();
    },
  });
}

export function policyPanel(context, node) {
  const open = node.policy === "permissive";
  const network = node.policy_network === "full";
  const admin = may.setPolicy(context.session);
  return el("section", { class: open ? "panel alarm" : "panel", "data-key": "policy" },
    el("h2", {}, "Policy ", modeBadge(node)),
    open && el("p", {},
      "The hub allows PERMISSIVE",
      node.policy_until_ms && [" for ", el("strong", { class: "countdown" }, counting("until", node.policy_until_ms)), " more"],
      node.policy_reason && [": ", el("q", {}, node.policy_reason)], "."),
    !open && network && el("p", {}, "Commands run in the sandbox, and may use the network",
      node.policy_until_ms && [" for ", counting("until", node.policy_until_ms), " more"],
      node.policy_reason && [": ", el("q", {}, node.policy_reason)], "."),
    !open && !network && el("p", { class: "quiet" }, "Commands run in the sandbox, without the network."),
    node.ceiling === "strict" && el("p", { class: "quiet" },
      "The node's owner has set STRICT as its bound: whatever the hub allows, it stays STRICT there. On the node: ",
      el("span", { class: "mono" }, "cortex-agent ceiling set permissive")),
    admin && !node.revoked_at_ms && el("div", { class: "buttons" },
      open || network
        ? el("button", { type: "button", onclick: () => end(context, node) }, "Back to STRICT")
        : null,
      !open && el("button", { type: "button", class: "danger", onclick: () => allow(context, node) }, "Allow PERMISSIVE…")));
}
