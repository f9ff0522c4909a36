"""The programs whose sync is measured, each behind the same few questions.

A subject lives for one scenario: `place` lays its source tree, `__enter__` starts what has to run
beforehand, the measured steps follow, `__exit__` ends everything.
"""

import json
import os
import shutil
import time
import urllib.request
import xml.etree.ElementTree as ElementTree

from mesh import Mesh
from tree import count_files
from world import Failed, WireCounter, cpu_seconds, free_port, peak_memory_mib

WORKSPACE = "bench"


def timed(act, world, done, interval_s=0.002):
    """Seconds from the beginning of `act` until `done()`."""
    started = time.perf_counter()
    act()
    world.wait_until("the end of the sync", done, interval_s=interval_s)
    return time.perf_counter() - started


class Subject:
    """What all have in common."""

    name = ""
    # Whether it watches by itself: then a save arrives without anybody running anything.
    continuous = False

    def __init__(self, world, files):
        self.world = world
        self.files = files
        self.folder = world.folder("subject")
        self.source = self.folder / "source"
        self.target = self.folder / "target"

    def place(self, template):
        """Lays a copy of the tree where the source is."""
        self.source.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(template, self.source)
        os.sync()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.folder, ignore_errors=True)

    def initial(self):
        """Syncs the whole tree to the empty target; seconds."""
        raise NotImplementedError

    def no_change(self):
        """Finds that nothing changed; seconds."""
        raise NotImplementedError

    def arrival(self, change, arrived):
        """Makes a change at the source, and waits until it is at the target; seconds."""
        raise NotImplementedError

    def wire(self):
        """A counter of its bytes on the wire, or `None`."""
        return None

    def wire_bytes(self, counter):
        """The bytes since then, by the name of the connection."""
        return {} if counter is None else {"": counter.bytes_since()}

    def memory_mib(self):
        """Peak resident memory of its processes, by name."""
        return {}

    def cpu_seconds(self):
        """Processor time of its processes so far, or `None` if it cannot be told."""
        return None


class CortexMesh(Subject):
    """Source node, hub and target node."""

    name = "cortex mesh"
    continuous = True

    def __init__(self, world, files):
        super().__init__(world, files)
        self._mesh = Mesh(world, self.folder, ["source", "target"])
        self.source = self.folder / "source/cortex" / WORKSPACE
        self.target = self.folder / "target/cortex" / WORKSPACE

    def __enter__(self):
        self._mesh.__enter__()
        self._mesh.agent("workspace", "create", WORKSPACE)
        return self

    def __exit__(self, *_):
        self._mesh.__exit__()
        super().__exit__()

    def initial(self):
        attached = self._mesh.agent("workspace", "attach", WORKSPACE, "--node", "source").seconds
        attached += self._mesh.agent("workspace", "attach", WORKSPACE, "--node", "target").seconds
        watched = self._mesh.agent("workspace", "status", WORKSPACE, "--watch").seconds
        present = count_files(self.target)
        if present != self.files:
            raise Failed(f"`status --watch` ended with {present} of {self.files} files there")
        return attached + watched

    def no_change(self):
        # The agent offers no "look now", but looks at everything when it starts.
        node = self._mesh.nodes["source"]
        self.world.end(node.process)
        return timed(lambda: self._mesh.run_node("source"), self.world,
                     lambda: self._mesh.synced_locally("source"))

    def arrival(self, change, arrived):
        return timed(change, self.world, arrived)

    def wire(self):
        return WireCounter(self.world, self._mesh.port)

    def wire_bytes(self, counter):
        return {f"{name} and hub": counter.bytes_since(node.process.pid)
                for name, node in self._mesh.nodes.items()}

    def memory_mib(self):
        return self._mesh.peaks_mib()

    def cpu_seconds(self):
        return self._mesh.cpu_seconds()


class Rsync(Subject):
    """`rsync -a` over a master connection of ssh."""

    name = "rsync"
    options = ["-a", "--delete"]

    def __init__(self, world, files, shell):
        super().__init__(world, files)
        self._shell = shell

    def _run(self):
        transport = " ".join(["ssh", *self._shell.transport])
        return self.world.run(["rsync", *self.options, "-e", transport,
                               f"{self.source}/", f"peer:{self.target}/"]).seconds

    def initial(self):
        self.target.mkdir()
        return self._run()

    def no_change(self):
        return self._run()

    def arrival(self, change, arrived):
        change()
        seconds = self._run()
        if not arrived():
            raise Failed(f"{self.name} ended and the change is not there")
        return seconds

    def wire(self):
        return WireCounter(self.world, self._shell.port)


class RsyncDurable(Rsync):
    """The same with every file flushed to disk, as cortex mesh does."""

    name = "rsync --fsync"
    options = ["-a", "--delete", "--fsync"]


class Unison(Rsync):
    """`unison` over the master connection, in one run for each sync."""

    name = "unison"

    def _run(self):
        archives = self.folder / "unison"
        archives.mkdir(exist_ok=True)
        return self.world.run(
            ["unison", self.source, f"ssh://peer/{self.target}", "-batch", "-auto", "-silent",
             "-confirmbigdel=false", "-times", "-log=false", "-sshargs",
             " ".join(self._shell.transport), "-servercmd", f"env UNISON={archives} unison"],
            env={**os.environ, "UNISON": str(archives)}).seconds


class Syncthing(Subject):
    """Two instances that know only each other."""

    name = "syncthing"
    continuous = True

    def __init__(self, world, files):
        super().__init__(world, files)
        self._sides = [SyncthingSide(world, self.folder / "one", self.source),
                       SyncthingSide(world, self.folder / "two", self.target)]

    def __enter__(self):
        one, two = self._sides
        try:
            for side, other in ((one, two), (two, one)):
                side.configure(other)
            for side in self._sides:
                side.start()
            self.world.wait_until(
                "syncthing's connection", lambda: one.connected() and two.connected(), 60, 0.05)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for side in self._sides:
            side.end()
        super().__exit__()

    def initial(self):
        self.target.mkdir()
        one, two = self._sides

        def share():
            for side, other in ((one, two), (two, one)):
                side.share(other)
        return timed(share, self.world, lambda: two.complete(self.files), interval_s=0.05)

    def no_change(self):
        return timed(self._sides[0].scan, self.world, lambda: True)

    def arrival(self, change, arrived):
        return timed(change, self.world, arrived)

    def wire(self):
        # Either may have called the other: one of the two ports carries the connection.
        return [WireCounter(self.world, side.port) for side in self._sides]

    def wire_bytes(self, counter):
        counts = [one.bytes_since() for one in counter]
        return {"": None if None in counts else sum(counts)}

    def memory_mib(self):
        one, two = self._sides
        return {"source": peak_memory_mib(one.process.pid),
                "target": peak_memory_mib(two.process.pid)}

    def cpu_seconds(self):
        return sum(cpu_seconds(side.process.pid) for side in self._sides)


class SyncthingSide:
    """One instance, steered over its REST interface."""

    # Its shortest; the default of 10 s would only measure that.
    WATCHER_DELAY_S = 1

    def __init__(self, world, home, path):
        self._world = world
        self._home = home
        self._path = path
        self.port = free_port()
        self._rest_port = free_port()
        self._key = "benchmark"
        self.process = None
        self.device = None
        home.mkdir(parents=True)
        world.run(["syncthing", "generate", f"--home={home}", "--no-default-folder",
                   "--skip-port-probing"])
        self.device = world.run(["syncthing", f"--home={home}", "--device-id"]).stdout.strip()

    def configure(self, other):
        """Everything off that would reach beyond this machine."""
        path = self._home / "config.xml"
        config = ElementTree.parse(path)
        root = config.getroot()
        gui = root.find("gui")
        gui.find("address").text = f"127.0.0.1:{self._rest_port}"
        gui.find("apikey").text = self._key
        options = root.find("options")
        for name, value in {
                "listenAddress": f"tcp://127.0.0.1:{self.port}", "globalAnnounceEnabled": "false",
                "localAnnounceEnabled": "false", "relaysEnabled": "false", "natEnabled": "false",
                "urAccepted": "-1", "crashReportingEnabled": "false", "startBrowser": "false",
                "autoUpgradeIntervalH": "0", "reconnectionIntervalS": "1"}.items():
            found = options.findall(name)
            element = found[0] if found else ElementTree.SubElement(options, name)
            element.text = value
            for extra in found[1:]:
                options.remove(extra)
        device = ElementTree.SubElement(
            root, "device", {"id": other.device, "name": "other", "compression": "always"})
        ElementTree.SubElement(device, "address").text = f"tcp://127.0.0.1:{other.port}"
        config.write(path)

    def start(self):
        """Starts it and waits until it answers."""
        self.process = self._world.start(
            ["syncthing", "serve", f"--home={self._home}", "--no-restart", "--no-browser",
             "--no-upgrade"], self._home / "log",
            # No monitor beside it: there is one process, which is the one that is measured.
            env={**os.environ, "STMONITORED": "yes"})
        self._world.wait_until("syncthing answers", self._answers, 60, 0.05)

    def end(self):
        """Ends it."""
        if self.process:
            self._world.end(self.process)

    def _ask(self, path, body=None, method=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._rest_port}/rest/{path}", method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"X-API-Key": self._key})
        with urllib.request.urlopen(request, timeout=300) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def _answers(self):
        try:
            return self._ask("system/ping")
        except OSError:
            return False

    def connected(self):
        """Whether the other side is there."""
        connections = self._ask("system/connections")["connections"]
        return any(connection["connected"] for connection in connections.values())

    def share(self, other):
        """Makes the directory a shared folder."""
        self._ask("config/folders", {
            "id": WORKSPACE, "path": str(self._path), "fsWatcherEnabled": True,
            "fsWatcherDelayS": self.WATCHER_DELAY_S, "rescanIntervalS": 3600,
            "devices": [{"deviceID": self.device}, {"deviceID": other.device}]}, "POST")

    def complete(self, files):
        """Whether all files are here."""
        status = self._ask(f"db/status?folder={WORKSPACE}")
        return status["state"] == "idle" and status["localFiles"] == files

    def scan(self):
        """Looks at everything, and returns when that is done."""
        self._ask(f"db/scan?folder={WORKSPACE}", method="POST", body={})
