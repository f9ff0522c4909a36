"""The sandbox alone: what it adds to the start and the end of a command.

Measured by the project's own test program, which stands for the agent: from the wish for a command to
the first byte of its output, and to the end of everything of it. Bubblewrap and no sandbox are
started by the same program. So neither the network nor the command line is in the figures.
"""

import os
import re
import shutil
from pathlib import Path

from results import Lower

STARTS_PER_RUN = 20
TO_OUTPUT = "sandbox: from the wish to the first output of `echo`"
TO_END = "sandbox: from the wish to the end of `echo`"
BY_MEMORY = "sandbox: start of a command by the memory of the agent, best of 32"
MANIFEST = Path(__file__).resolve().parents[2] / "Cargo.toml"


def measure(world, results, runs):
    """Measures the agent's sandbox, bubblewrap and no sandbox, interleaved; then large agents."""
    measure_starts(world, results, runs)
    measure_by_memory(world, results, runs)


def measure_starts(world, results, runs):
    """Measures the agent's sandbox, bubblewrap and no sandbox, interleaved."""
    for workload in (TO_OUTPUT, TO_END):
        results.note(workload, "25 ms pass between two commands, in which the agent makes the "
                     "sandbox of the next; a command that finds none is in a row of its own. "
                     "Bubblewrap has the same namespaces, a read-only /usr, private /proc, /dev and "
                     "/tmp and no capabilities, but neither Landlock nor a system call filter nor "
                     "limits, which are in the figures of cortex mesh")
    if not shutil.which("bwrap"):
        results.skip("the sandbox's start", "bwrap is not installed")
        return
    for number in range(runs):
        said = test(world, "start::apart_beside_bubblewrap", ROUNDS=str(STARTS_PER_RUN))
        for subject, to_output, to_end in re.findall(r"^(.+)\t(\d+)\t(\d+)$", said, re.MULTILINE):
            results.add("sandbox", TO_OUTPUT, subject, "ms", Lower, int(to_output) / 1e3)
            results.add("sandbox", TO_END, subject, "ms", Lower, int(to_end) / 1e3)
        world.say(f"sandbox starts, run {number + 1} of {runs}")


def measure_by_memory(world, results, runs):
    """Measures whether a large agent starts commands more slowly than a small one.

    The test program touches as much memory as the agent is to have.
    """
    results.note(BY_MEMORY, "from the request to the command being executed, the two sizes taking "
                 "turns in one process; a `fork` of the larger would take some 10 ms longer")
    for _ in range(runs):
        said = test(world, "start::apart_by_memory")
        for size, milliseconds in re.findall(r"(\d+ MiB) ([0-9.]+) ms", said):
            # The first is the one that others are compared with.
            subject = "cortex mesh" if size == "64 MiB" else "an agent"
            results.add("sandbox", BY_MEMORY, f"{subject} of {size}", "ms", Lower,
                        float(milliseconds))


def test(world, name, **variables):
    """What one of the tests for this script prints."""
    command = ["cargo", "test", "--release", "--locked", "--quiet", "--manifest-path", MANIFEST,
               "-p", "cortex-agent", "--test", "sandbox", "--", "--exact", name, "--ignored",
               "--nocapture"]
    return world.run(command, env={**os.environ, **variables}).stdout
