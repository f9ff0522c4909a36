// Nodes, and one of them with its policy and the output of its commands.
import { el } from "./dom.js";
import { count, counting } from "./format.js";
import { history } from "./history.js";
import { badge, empty, facts, mono, nodeLink, table } from "./parts.js";
import { modeBadge, policyPanel } from "./policy.js";
import { taskTable } from "./tasks.js";

// What a page shows; who has more narrows the list by labels.
const MOST = 1000;

export function state(node) {
  if (node.revoked_at_ms) return badge("bad", "revoked");
  if (!node.online) return badge("off", "offline");
  return node.cordoned ? badge("warn", "cordoned") : badge("good", "online");
}

function labels(node) {
  const pairs = Object.entries(node.labels);
  return pairs.map(([key, value]) => el("span", { class: "label mono" }, value ? `${key}=${value}` : key));
}

function row(node) {
  return {
    key: node.node_id,
    tone: node.online ? "" : "dim",
    cells: [
      [nodeLink(node.name), node.clone && [" ", badge("bad", "copied identity")]],
      state(node),
      modeBadge(node),
      labels(node),
      node.running_tasks ? mono(node.running_tasks) : el("span", { class: "quiet" }, "0"),
      mono(`${node.os}/${node.arch}`),
      mono(node.agent_version),
      node.online ? ["up ", counting("since", node.last_seen_ms)] : counting("ago", node.last_seen_ms),
    ],
  };
}

// What may change what is shown of a node.
const ABOUT = /^(node|policy|task)\./;
const COLUMNS = ["Node", "State", "Commands", "Labels", "Running", "System", "Agent", "Seen"];

export function nodesView(context) {
  let [wanted, online] = ["", ""];
  const query = () => {
    const selector = wanted.startsWith("@") ? `&selector=${context.part(wanted)}` : "";
    return `/nodes?limit=${MOST}${selector}${online && `&online=${online}`}`;
  };
  const matches = (node) => wanted.startsWith("@") ||
    [node.name, node.hostname, ...Object.entries(node.labels).map((pair) => pair.join("="))]
      .some((text) => text.toLowerCase().includes(wanted.toLowerCase()));
  const filter = el("form", { class: "filter", role: "search", "data-key": "filter", "data-keep": "filter", onsubmit: (event) => event.preventDefault() },
    el("label", { for: "wanted" }, "Filter"),
    el("input", {
      id: "wanted", type: "search", placeholder: "part of a name, or @env=dev", autocomplete: "off", spellcheck: "false",
      oninput: (event) => {
        const before = wanted;
        wanted = event.target.value.trim();
        // Names are looked for in what is here; labels are the hub's to find.
        if (wanted.startsWith("@") || before.startsWith("@")) context.refresh();
        else context.render();
      },
    }),
    el("label", { for: "online" }, "State"),
    el("select", { id: "online", onchange: (event) => { online = event.target.value; context.refresh(); } },
      el("option", { value: "" }, "all"), el("option", { value: "true" }, "online"), el("option", { value: "false" }, "offline")));
  let narrowing = null;
  return {
    title: "Nodes",
    touches: ({ kind }) => ABOUT.test(kind),
    // Nobody waits for the whole list while a selector is half typed.
    load: async () => {
      try {
        narrowing = null;
        return { page: await context.get(query()) };
      } catch (error) {
        if (!wanted.startsWith("@") || error.status !== 400) throw error;
        narrowing = error.detail;
        return { page: { nodes: [] } };
      }
    },
    render: ({ page }) => {
      const nodes = page.nodes.filter(matches);
      const online = nodes.filter((node) => node.online).length;
      return [
        el("h1", {}, "Nodes"), filter,
        narrowing ? empty(narrowing)
          : nodes.length ? table(`${count(nodes.length, "node")}, ${online} online`, COLUMNS, nodes.map(row))
            : page.nodes.length || wanted ? empty("No node matches.")
              : empty("There are no nodes yet. One line makes one: ", mono("cortex-hubd invite create")),
        page.next_cursor && el("p", { class: "quiet" }, `These are the first ${MOST}. Narrow them: @key=value`),
      ];
    },
  };
}

function warnings(node) {
  return [
    node.clone && el("p", { class: "trouble" }, badge("bad", "copied identity"),
      ` Another machine (${node.clone.hostname}, ${node.clone.remote_address}) showed this node's identity and was refused, `,
      counting("ago", node.clone.at_ms), "."),
    node.strict_available === false && el("div", { class: "trouble" }, badge("warn", "no sandbox"),
      " This node's kernel cannot enforce STRICT: commands are refused.",
      el("ul", {}, node.missing.map((lack) => el("li", {}, lack.what, ": ", lack.why, " ", mono(lack.remedy))))),
    Math.abs(node.clock_skew_ms) > 5000 && el("p", { class: "trouble" }, badge("warn", "clock"),
      ` This node's clock is ${Math.round(Math.abs(node.clock_skew_ms) / 1000)} s ${node.clock_skew_ms > 0 ? "behind" : "ahead"}.`),
  ];
}

export function nodeView(context, name) {
  const output = history(context, name);
  let id = null;
  return {
    title: name,
    touches: (event) => ABOUT.test(event.kind) && (!id || event.node_id === id),
    told: () => output.wake(),
    load: async () => {
      const [node, tasks] = await Promise.all([
        context.get(`/nodes/${context.part(name)}`),
        context.get(`/tasks?limit=8&node=${context.part(name)}`),
      ]);
      id = node.node_id;
      output.running(node.running_tasks > 0);
      return { node, tasks };
    },
    render: ({ node, tasks }) => [
      el("h1", {}, mono(node.name), " ", state(node)),
      warnings(node),
      facts([
        ["Seen", node.online ? ["connected for ", counting("since", node.last_seen_ms)] : counting("ago", node.last_seen_ms)],
        ["Host", mono(node.hostname)],
        ["System", mono(`${node.os}/${node.arch}`)],
        ["Agent", mono(node.agent_version)],
        ["Address", node.remote_address && mono(node.remote_address)],
        ["Owner", node.owner],
        ["Joined", counting("ago", node.joined_at_ms)],
        ["Certificate", node.certificate_not_after_ms && ["good for ", counting("until", node.certificate_not_after_ms)]],
        ["Labels", labels(node).length ? labels(node) : null],
        ["Id", mono(node.node_id)],
      ]),
      policyPanel(context, node),
      output.panel,
      el("h2", {}, "Latest tasks"),
      tasks.tasks.length ? taskTable(context, "of this node", tasks.tasks, false) : empty("Nothing ran here yet."),
    ],
  };
}
