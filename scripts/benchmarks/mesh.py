"""A hub and nodes of cortex mesh, as `scripts/demo` starts them."""

import json
import os
import subprocess
from pathlib import Path

from world import Failed, cpu_seconds, peak_memory_mib

ROOT = Path(__file__).resolve().parents[2]
# Set by scripts/bench.
PROGRAMS = Path(os.environ["CORTEX_BENCH_PROGRAMS"])
AGENT = PROGRAMS / "cortex-agent"
HUB = PROGRAMS / "cortex-hubd"


class Node:
    """An agent that is connected."""

    def __init__(self, name, process, state, workspaces):
        self.name = name
        self.process = process
        self.state = state
        self.workspaces = workspaces


class Mesh:
    """One hub, its nodes, and an operator who is logged in. To be used with `with`."""

    def __init__(self, world, folder, names):
        self._world = world
        self._folder = folder
        self._names = names
        self._environment = {**os.environ, "CORTEX_CONFIG_DIR": str(folder / "operator")}
        self.nodes = {}
        self.hub = None
        self.port = None

    def __enter__(self):
        try:
            self._start_hub()
            for name in self._names:
                self._join(name)
            for name in self._names:
                self.agent("node", "wait", name, "--for", "online", "--timeout", "30s")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for node in self.nodes.values():
            self._world.end(node.process)
        if self.hub:
            self._world.end(self.hub)

    def _start_hub(self):
        data = self._folder / "hub"
        self.hub = self._world.start(
            [HUB, "serve", "--grpc", "127.0.0.1:0", "--http", "off", "--data", data], self._folder / "hub.log",
            stdout=subprocess.PIPE)
        line = self.hub.stdout.readline().decode()
        if "listening on" not in line:
            raise Failed(f"the hub did not start: {(self._folder / 'hub.log').read_text()[-2000:]}")
        self._address = line.split()[-1]
        self.port = int(self._address.rsplit(":", 1)[1])
        self._pin = self._hubd("ca", "pin").strip()
        token = json.loads(self._hubd("operator", "create", "bench", "--role", "admin",
                                      "-o", "json"))["token"]
        self._world.run([AGENT, "login", self._address, "--ca", self._pin],
                        env={**self._environment, "CORTEX_TOKEN": token})

    def _hubd(self, *args):
        return self._world.run([HUB, *args, "--data", self._folder / "hub"]).stdout

    def _join(self, name):
        folder = self._folder / name
        folder.mkdir()
        token = json.loads(self._hubd("invite", "create", "-o", "json"))["token"]
        self._world.run(
            [AGENT, "--state", folder / "state", "join", self._address, "--ca", self._pin,
             "--name", name, "--workspace-root", folder / "cortex"],
            env={**os.environ, "CORTEX_TOKEN": token})
        self.nodes[name] = Node(name, None, folder / "state", folder / "cortex")
        self.run_node(name)

    def run_node(self, name):
        """Starts a node's agent."""
        node = self.nodes[name]
        node.process = self._world.start(
            [AGENT, "--state", node.state, "run"], self._folder / f"{name}.log")

    def agent(self, *args):
        """Runs the operator's command line."""
        return self._world.run(self.command(*args), env=self._environment)

    def command(self, *args):
        """Program and arguments of the operator's command line."""
        return [str(arg) for arg in (AGENT, *args)]

    @property
    def environment(self):
        """What the operator's command line needs to know."""
        return self._environment

    def synced_locally(self, name):
        """Whether a node itself says that it is at the head of its one workspace."""
        node = self.nodes[name]
        try:
            answer = self._world.run(
                [AGENT, "--state", node.state, "workspace", "status", "--local", "-o", "json"])
        except Failed:
            # The agent does not listen yet.
            return False
        rows = json.loads(answer.stdout)
        return all(row["state"] == "idle" and row["applied_seq"] == row["head_seq"] > 0
                   for row in rows) and len(rows) > 0

    def peaks_mib(self):
        """The most memory each process has had."""
        peaks = {name: peak_memory_mib(node.process.pid) for name, node in self.nodes.items()}
        return {"hub": peak_memory_mib(self.hub.pid), **peaks}

    def cpu_seconds(self):
        """Processor time of hub and nodes together."""
        return cpu_seconds(self.hub.pid) + sum(
            cpu_seconds(node.process.pid) for node in self.nodes.values())
