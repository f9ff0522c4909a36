"""The hub alone, under emulated nodes that speak the real protocol: `cortex-hubd bench`.

There is no peer that does the same, so there are no ratios; the goals of the project stand in the notes.
Hub and nodes share the machine, so that times are longer than with nodes elsewhere; the memory is the
hub's alone.
"""

import json

from mesh import HUB
from results import Higher, Lower
from world import Failed

# What `cortex-hubd bench` says if it may not have as many connections as it was asked for.
NO_DESCRIPTORS = "open files"

MEMORY = "hub: resident memory for each idle node that is connected"
RECONNECT = "hub: 10,000 nodes come back after `kill -9` of the hub"
JOIN = "hub: 2,000 nodes join at once while the store stalls for 5 s"
OPEN_LOOP = "hub: commands in an open loop, {rate} a second"
FANOUT = "hub: `true` on 1,000 nodes at once"
FLOOD = "hub: 8 floods, one of which nobody reads, and short commands beside them"
OPEN_LOOP_RATES = (200, 1000)


def measure(world, results, runs):
    """Measures each as often as asked for; those of 10,000 nodes, of which one run takes a minute,
    once or twice."""
    few = min(runs, 2)
    for kind, times in ((memory, few), (reconnect, few), (join, few), (open_loop, runs),
                        (fanout, runs), (flood, few)):
        for run in range(times):
            kind(world, results)
            world.say(f"hub {kind.__name__}, run {run + 1} of {times}")


def bench(world, results, workload, *args):
    """What `cortex-hubd bench` measures, or nothing, which the results say."""
    command = [HUB, "bench", *args, "-o", "json"]
    shown = " ".join(["cortex-hubd", *map(str, command[1:-2])])
    results.note(workload, f"`{shown}`")
    try:
        return json.loads(world.run(command).stdout)
    except Failed as error:
        if NO_DESCRIPTORS in str(error):
            results.skip(workload, str(error).strip().rpartition("\n")[2])
        else:
            results.failed(workload, str(error))
        return None


def memory(world, results):
    """Idle nodes."""
    for count in (1000, 10_000):
        said = bench(world, results, MEMORY, "nodes", "--count", count, "--duration", "20s")
        if said:
            results.add("hub", MEMORY, f"{count:,} nodes", "KiB", Lower,
                        said["hub_bytes_per_node"] / 1024)
    results.note(MEMORY, "`cortex-hubd bench nodes --count N --duration 20s`: TLS and everything else of "
                 "the hub included, 20 s after the last of them joined. Goal: 36 KiB at 10,000")


def reconnect(world, results):
    """The hub is killed under connected nodes, which come back after a random part of a second."""
    said = bench(world, results, RECONNECT, "reconnect", "--count", 10_000)
    if not said:
        return
    calls = said["operator_calls"]
    add_all(results, RECONNECT, "s", {
        "all are back": said["returned"]["max_ms"] / 1000,
        "an operator's call meanwhile, middle": calls["p50_ms"] / 1000,
        "an operator's call meanwhile, slowest": calls["max_ms"] / 1000,
    })
    results.note(RECONNECT, f"{results.notes[RECONNECT]}: from when the next hub listens; an operator asks "
                 "for a node all the while. Goals: 30 s, and no call above 1 s")


def join(world, results):
    """A crowd, and a store that takes no calls."""
    said = bench(world, results, JOIN, "join", "--joins", 2000, "--connected", 200, "--stall", "5s")
    if not said:
        return
    trip = {when: said[f"heartbeats_{when}"]["round_trip"] for when in ("before", "during")}
    add_all(results, JOIN, "s", {"the last is in": said["last_ms"] / 1000})
    add_all(results, JOIN, "ms", {
        "heartbeats of 200 connected nodes before it, p99": trip["before"]["p99_ms"],
        "heartbeats of 200 connected nodes during it, p99": trip["during"]["p99_ms"]})
    results.note(JOIN, f"{results.notes[JOIN]}: from the first to the last, none lost, none doubled, no "
                 "session lost; a heartbeat is measured from sending it to its answer. Hub and nodes are one process here, "
                 "which makes 2,000 TLS connections from both sides")


def open_loop(world, results):
    """Commands that are due at fixed times."""
    for rate in OPEN_LOOP_RATES:
        workload = OPEN_LOOP.format(rate=f"{rate:,}")
        said = bench(world, results, workload, "exec", "--count", 50, "--rate", rate,
                     "--duration", "10s")
        if said:
            latency = said["latency"]
            add_all(results, workload, "ms",
                    {"middle": latency["p50_ms"], "p99": latency["p99_ms"],
                     "slowest": latency["max_ms"]})
            results.note(workload, f"{results.notes[workload]}: from when each was due, whatever became of "
                         "those before, to its exit; each is journalled before it is sent")


def fanout(world, results):
    """One command on all nodes, and again while one of them is silent."""
    said = bench(world, results, FANOUT, "fanout", "--count", 1000, "--rounds", 5,
                 "--black-holed", 1)
    if not said:
        return
    holed = said["beside_black_holes"]
    add_all(results, FANOUT, "s", {
        "all done": said["all"]["p50_ms"] / 1000,
        "all others done, beside one whose line is dead": holed["all"]["p50_ms"] / 1000,
        "its caller is told": holed["told"]["max_ms"] / 1000,
    })
    results.note(FANOUT, f"{results.notes[FANOUT]}: the middle of 5 rounds, over one connection of an "
                 "operator. Goal: 1 s")


def flood(world, results):
    """Commands that write without end."""
    said = bench(world, results, FLOOD, "flood", "--count", 8, "--duration", "10s")
    if not said:
        return
    results.add("hub", FLOOD, "read by all callers", "MB/s", Higher, said["megabytes_per_second"])
    add_all(results, FLOOD, "ms", {"a short command beside them, middle": said["beside"]["p50_ms"],
                                   "a short command beside them, slowest": said["beside"]["max_ms"]})
    add_all(results, FLOOD, "MiB", {"memory of the hub, before": said["hub_bytes_before"] / 2**20,
                                    "memory of the hub, at most": said["hub_bytes_peak"] / 2**20})


def add_all(results, workload, unit, values):
    """Several rows of one workload."""
    for subject, value in values.items():
        results.add("hub", workload, subject, unit, Lower, value)
