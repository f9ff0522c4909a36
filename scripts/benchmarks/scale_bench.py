"""A hundred thousand files: how long looking at them takes, and what an agent costs that watches them."""

import os
import random
import shutil
import time

from mesh import AGENT, Mesh
from results import Lower
from tree import SEED, SourceText
from world import cpu_seconds_exact, memory_mib, peak_memory_mib

FILES = 100_000
FOLDERS = 2_000
WORKSPACE = "large"
REST_S = 60

SCAN = f"nothing changed, {FILES:,} files"
MEMORY = f"memory of an agent with {FILES:,} watched files"
REST = f"processor time of an agent with {FILES:,} watched files, in a minute without changes"


def measure(world, results, runs, shell):
    """Measures one node, and rsync on a copy of its tree."""
    results.note(SCAN, "cortex mesh: `workspace flush`, which looks at every file and asks the hub, and a restart "
                 "of the agent until it is at the head; rsync: one run over a master connection, "
                 "which looks at both sides. Goal for the look: 0.3 s")
    results.note(MEMORY, "after a restart, once it is at rest. Goal: 40 MiB at rest, 60 MiB while it looks")
    results.note(REST, "goal: not measurable")
    template = world.folder("large")
    make(template)
    with Mesh(world, world.folder("scale"), ["source"]) as mesh:
        node = mesh.nodes["source"]
        mesh.agent("workspace", "create", WORKSPACE)
        node.workspaces.mkdir(exist_ok=True)
        os.rename(template, node.workspaces / WORKSPACE)
        mesh.agent("workspace", "attach", WORKSPACE, "--node", "source")
        mesh.agent("workspace", "status", WORKSPACE, "--watch")
        add = lambda workload, subject, unit, value: results.add(
            "sync", workload, subject, unit, Lower, value)
        add(MEMORY, "cortex mesh (at most, during the first sync)", "MiB",
            peak_memory_mib(node.process.pid))
        copy = world.scratch / "copy"
        shutil.copytree(node.workspaces / WORKSPACE, copy)
        for run in range(runs):
            world.end(node.process)
            started = time.perf_counter()
            mesh.run_node("source")
            world.wait_until("the agent is at the head", lambda: mesh.synced_locally("source"))
            add(SCAN, "cortex mesh (restart)", "s", time.perf_counter() - started)
            for _ in range(3):
                done = world.run([AGENT, "--state", node.state, "workspace", "flush", WORKSPACE])
                add(SCAN, "cortex mesh", "s", done.seconds)
            add(MEMORY, "cortex mesh (at most, while it looks)", "MiB",
                peak_memory_mib(node.process.pid))
            if shutil.which("rsync"):
                transport = " ".join(["ssh", *shell.transport])
                done = world.run(["rsync", "-a", "--delete", "-e", transport,
                                  f"{node.workspaces / WORKSPACE}/", f"peer:{copy}/"])
                add(SCAN, "rsync", "s", done.seconds)
            world.say(f"{FILES:,} files, run {run + 1} of {runs}")
        # What starting and looking left to do has been done by then.
        time.sleep(5)
        before = cpu_seconds_exact(node.process.pid)
        time.sleep(REST_S)
        add(REST, "cortex mesh", "ms", 1000 * (cpu_seconds_exact(node.process.pid) - before))
        add(MEMORY, "cortex mesh", "MiB", memory_mib(node.process.pid))
    shutil.rmtree(copy)


def make(root):
    """Makes the tree: small files, as many in each folder."""
    rng = random.Random(SEED + 3)
    text = SourceText(rng).make(1 << 20)
    for number in range(FOLDERS):
        folder = root / f"part{number % 40}" / f"part{number}"
        folder.mkdir(parents=True)
        for index in range(FILES // FOLDERS):
            start = rng.randrange(len(text) - 4096)
            # Different each, so that no content is there twice.
            content = b"%d %d\n" % (number, index) + text[start:start + rng.randrange(64, 2048)]
            (folder / f"file{index}.txt").write_bytes(content)
