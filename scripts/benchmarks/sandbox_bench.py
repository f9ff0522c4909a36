"""The sandbox alone: what it adds to the start and the end of a command.

Seen from outside, by the kernel's process events: from the creation of the first process (of the
agent's sandbox stage, of bubblewrap, of the command itself) to the `exec` of the command, and to the
end of that first process. So neither the network nor the command line is in the figures.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from mesh import Mesh
from process_events import ProcessEvents
from results import Lower

STARTS_PER_RUN = 20
# Of the same directory in each sandbox; it does nothing.
COMMAND = "/bin/true"
TO_EXEC = "sandbox: from the first process to the `exec` of the command"
BY_MEMORY = "sandbox: start of a command by the memory of the agent, best of 32"
TO_END = "sandbox: from the first process to its end, with `true` inside"


def measure(world, results, runs):
    """Measures the agent's sandbox, bubblewrap and no sandbox, interleaved; then large agents."""
    measure_starts(world, results, runs)
    measure_by_memory(world, results, runs)


def measure_starts(world, results, runs):
    """Measures the agent's sandbox, bubblewrap and no sandbox, interleaved."""
    for workload in (TO_EXEC, TO_END):
        results.note(workload, "bubblewrap has the same namespaces, a read-only /usr, private "
                     "/proc, /dev and /tmp and no capabilities, but neither Landlock nor a "
                     "system call filter nor resource limits, which are in the figures of cortex "
                     "mesh")
    if os.geteuid() != 0:
        results.skip("the sandbox's start", "the kernel's process events are for root only")
        return
    with Mesh(world, world.folder("sandbox"), ["north"]) as mesh, ProcessEvents() as events:
        agent = mesh.nodes["north"].process.pid

        def in_the_mesh():
            world.run(mesh.command("exec", "north", "--", COMMAND), env=mesh.environment)
        subjects = [("cortex mesh, STRICT", agent, in_the_mesh)]
        if shutil.which("bwrap"):
            workspace = world.folder("bubblewrap")
            command = bubblewrap(workspace)
            subjects.append(("bubblewrap", os.getpid(), lambda: plain(command)))
        else:
            results.skip("bubblewrap's start", "bwrap is not installed")
        subjects.append(("no sandbox (bash -c)", os.getpid(),
                         lambda: plain(["bash", "-c", f"exec {COMMAND}"])))
        for _, _, act in subjects:
            act()
        for number in range(STARTS_PER_RUN * runs):
            for name, parent, act in subjects:
                found = events.watch(parent, act)
                if not found:
                    results.skip(f"a start of {name}", "the kernel's process events did not come")
                    continue
                to_exec, to_end = found
                results.add("sandbox", TO_EXEC, name, "ms", Lower, to_exec / 1e6)
                results.add("sandbox", TO_END, name, "ms", Lower, to_end / 1e6)
            if number % STARTS_PER_RUN == 0:
                world.say(f"sandbox starts, run {number // STARTS_PER_RUN + 1} of {runs}")


def measure_by_memory(world, results, runs):
    """Measures whether a large agent starts commands more slowly than a small one.

    Done by the project's own test, whose process stands for the agent and touches as much memory as
    it is to have.
    """
    results.note(BY_MEMORY, "from the request to the command being executed, the two sizes taking "
                 "turns in one process; a `fork` of the larger would take some 10 ms longer")
    manifest = Path(__file__).resolve().parents[2] / "Cargo.toml"
    command = ["cargo", "test", "--release", "--locked", "--quiet", "--manifest-path", manifest,
               "-p", "cortex-agent", "--test", "sandbox", "--", "--exact", "start::apart_by_memory",
               "--ignored", "--nocapture"]
    for _ in range(runs):
        said = world.run(command).stdout
        for size, milliseconds in re.findall(r"(\d+ MiB) ([0-9.]+) ms", said):
            # The first is the one that others are compared with.
            subject = "cortex mesh" if size == "64 MiB" else "an agent"
            results.add("sandbox", BY_MEMORY, f"{subject} of {size}", "ms", Lower,
                        float(milliseconds))


def plain(command):
    """Runs a command without a pipe in between."""
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)


def bubblewrap(workspace):
    """The command in bubblewrap, with as much of the agent's sandbox as it has."""
    links = []
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            links += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            links += ["--ro-bind", f"/{name}", f"/{name}"]
    return ["bwrap", "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session",
            "--cap-drop", "ALL", "--uid", "1000", "--gid", "1000", "--hostname", "sandbox",
            "--ro-bind", "/usr", "/usr", *links, "--ro-bind", "/etc", "/etc", "--proc", "/proc",
            "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/run", "--bind", str(workspace),
            "/workspace", "--chdir", "/workspace", "--clearenv", "--setenv", "PATH",
            "/usr/bin:/bin", "--", COMMAND]
