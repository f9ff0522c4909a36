"""Commands: how soon they are done, and how fast their output comes."""

import os
import subprocess
import time

import fanout_bench
from mesh import Mesh
from results import Higher, Lower
from secure_shell import SecureShell
from world import Failed

STARTS_PER_RUN = 20
START = "run `true`, from the start of the client to its end"
# Program and arguments, and how many bytes it prints.
OUTPUTS = [
    ("output of `seq 1 20000000`", ["seq", "1", "20000000"], 168_888_897),
    ("output of `head -c 1G /dev/zero`", ["head", "-c", "1G", "/dev/zero"], 1 << 30),
]


def measure(world, results, runs):
    """Measures cortex mesh, ssh with a master connection, and ssh without, interleaved; then many nodes."""
    measure_one(world, results, runs)
    fanout_bench.measure(world, results, runs)


def measure_one(world, results, runs):
    """One node, and one ssh server."""
    results.note(START, "cortex mesh: `cortex-agent exec`, a new TLS connection to the hub, the "
                 "command in the STRICT sandbox of the node; ssh: same user, no sandbox")
    for workload, _, _ in OUTPUTS:
        results.note(workload, "read by a pipe and counted; `local pipe` is the command without "
                     "any network, as the upper bound")
    with SecureShell(world) as shell, Mesh(world, world.folder("exec"), ["north"]) as mesh:
        def exec_command(command):
            return mesh.command("exec", "north", "--", *command)
        subjects = [("cortex mesh", exec_command),
                    ("ssh, master connection", lambda command: shell.command(*command)),
                    ("ssh, cold", lambda command: shell.command(*command, cold=True))]
        for _, wrap in subjects:
            # The first of each pays for caches; it does not count.
            world.run(wrap(["true"]), env=mesh.environment)
        for number in range(STARTS_PER_RUN * runs):
            for name, wrap in subjects:
                done = world.run(wrap(["true"]), env=mesh.environment)
                results.add("exec", START, name, "ms", Lower, 1000 * done.seconds)
            if number % STARTS_PER_RUN == 0:
                world.say(f"exec starts, run {number // STARTS_PER_RUN + 1} of {runs}")
        subjects = subjects[:2] + [("local pipe", lambda command: command)]
        for run in range(runs):
            for workload, command, size in OUTPUTS:
                for name, wrap in subjects:
                    try:
                        seconds = drain(wrap(command), mesh.environment, size)
                    except Failed as error:
                        results.failed(f"{workload}, {name}", str(error))
                        continue
                    results.add("exec", workload, name, "MB/s", Higher, size / seconds / 1e6)
            world.say(f"exec output, run {run + 1} of {runs}")


def drain(command, environment, expected):
    """Runs a command and reads its output to the end; seconds."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          env=environment, start_new_session=True) as child:
        try:
            total = 0
            while piece := os.read(child.stdout.fileno(), 1 << 20):
                total += len(piece)
        except BaseException:
            child.kill()
            raise
    seconds = time.perf_counter() - started
    if child.returncode != 0 or total != expected:
        raise Failed(f"exit code {child.returncode}, {total} of {expected} bytes")
    return seconds
