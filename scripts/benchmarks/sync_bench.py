"""Sync: one scenario, which every subject plays through in turn."""

import os
import random
import shutil
import time

import scale_bench
import sync_peers
import tree
from history import NEW, OLD, History
from results import Lower
from secure_shell import SecureShell
from world import Failed

SAVES = 50
# Those that are started anew for each save would only repeat the same figure.
SAVES_OF_THE_STARTED = 5
# Between saves; drawn at random, so that no timer of a subject stays in step with them.
PAUSE_S = (0.15, 0.45)

INITIAL = "initial sync, 10,000 files"
INITIAL_CPU = "initial sync, processor time of all its processes"
NO_CHANGE = "nothing changed, 10,000 files"
BIG = "one new 512 MiB file, half compressible"
BIG_WIRE = "one new 512 MiB file, bytes on the wire"
INSERT = "1 KiB inserted near its start"
INSERT_WIRE = "1 KiB inserted near its start, bytes on the wire"
SWITCH = "a branch is switched in this project's own history, there and back"
SAVE = "one save in the 10,000 files, until it is there"
MEMORY = "peak memory at the end of all this"


def measure(world, results, runs):
    """Measures all subjects that are there, interleaved."""
    template = world.folder("template")
    results.skip("memory of rsync and unison", "they run only as long as they sync")
    world.say("making the files…")
    paths = tree.make_tree(template)
    big, longer = world.scratch / "big", world.scratch / "longer"
    tree.make_big_file(big)
    tree.insert_near_start(big, longer)
    template_digest = tree.digest(template)
    notes(results)
    history = History(world) if History.is_there() else None
    if history:
        results.note(SWITCH, f"`git checkout` between {OLD[:10]} and {NEW[:10]}, {len(history.changed[OLD])} files "
                     "apart, from its start until all of them are at the target (rsync and unison: a "
                     "run right after it), beside the 10,000 files")
    else:
        results.skip(SWITCH, "its commits are not in this clone")
    with SecureShell(world) as shell:
        makers = subjects(results, world, len(paths), shell)
        for run in range(runs):
            for maker in list(makers):
                started = time.monotonic()
                try:
                    with_one(world, results, maker(), template, template_digest, paths, big,
                             longer, history, run)
                except Failed as error:
                    results.failed(f"sync with {maker.label}", str(error))
                world.say(f"sync run {run + 1} of {runs}: {maker.label}, "
                          f"{time.monotonic() - started:.0f} s")
        scale_bench.measure(world, results, runs, shell)


def notes(results):
    """What the words of the table mean."""
    results.note(INITIAL, "cortex mesh: from `workspace attach` on both nodes to the end of "
                 "`workspace status --watch`, two hops, durable at the hub and at the target; "
                 "rsync and unison: one run over a master connection of ssh, one hop, not flushed "
                 "unless it says --fsync; syncthing: from sharing the folder to idle with all files")
    results.note(NO_CHANGE, "cortex mesh: a restart of the source's agent until it is at the head "
                 "again, which is when it looks at every file; syncthing: a rescan; rsync and "
                 "unison: one run")
    results.note(BIG, "from its rename into the tree to its appearance, whole, at the target "
                 "(rsync and unison: to the end of their run)")
    results.note(SAVE, f"in the tree at rest; cortex mesh and syncthing watch by themselves (syncthing with its shortest "
                 f"delay, {sync_peers.SyncthingSide.WATCHER_DELAY_S} s, instead of 10 s); rsync and "
                 "unison: one run right after the save")


def subjects(results, world, files, shell):
    """How to make each subject; says which are missing."""
    makers = []

    def add(program, kind, *args):
        if program and not shutil.which(program):
            results.skip(f"sync with {kind.name}", f"{program} is not installed")
            return

        def make():
            return kind(world, files, *args)
        make.label = kind.name
        makers.append(make)
    add(None, sync_peers.CortexMesh)
    add("rsync", sync_peers.Rsync, shell)
    add("rsync", sync_peers.RsyncDurable, shell)
    add("unison", sync_peers.Unison, shell)
    add("syncthing", sync_peers.Syncthing)
    return makers


def with_one(world, results, subject, template, template_digest, paths, big, longer, history, run):
    """Plays the scenario once."""
    def add(workload, unit, value):
        results.add("sync", workload, subject.name, unit, Lower, value)

    with subject:
        subject.place(template)
        cpu_before = subject.cpu_seconds()
        add(INITIAL, "s", subject.initial())
        if cpu_before is not None:
            add(INITIAL_CPU, "s", subject.cpu_seconds() - cpu_before)
        if tree.digest(subject.target) != template_digest:
            raise Failed("the trees differ after the initial sync")
        add(NO_CHANGE, "s", subject.no_change())
        save_many(add, subject, paths, run)
        if history:
            switch(add, subject, history)
        for version, workload, on_wire in ((big, BIG, BIG_WIRE), (longer, INSERT, INSERT_WIRE)):
            seconds, wire = send_big(world, subject, version)
            add(workload, "s", seconds)
            for name, count in wire.items():
                if count is None:
                    results.skip(f"{on_wire}: {subject.name} {name}".rstrip(),
                                 "a connection ended meanwhile, and its count with it")
                else:
                    label = f"{subject.name} ({name})" if name else subject.name
                    results.add("sync", on_wire, label, "MB", Lower, count / 1e6)
        if tree.digest(subject.source) != tree.digest(subject.target):
            raise Failed("the trees differ at the end")
        for name, mib in subject.memory_mib().items():
            results.add("sync", MEMORY, f"{subject.name} ({name})", "MiB", Lower, mib)


def send_big(world, subject, version):
    """Puts a version of the big file into the tree; seconds, and bytes on the wire."""
    ready = world.scratch / "ready"
    shutil.copyfile(version, ready)
    size = ready.stat().st_size
    # Data of the copy that is still on its way to the disk would slow down everybody's flush.
    os.sync()
    there = subject.target / "big.bin"
    counter = subject.wire()

    def arrived():
        try:
            return there.stat().st_size == size
        except FileNotFoundError:
            return False
    seconds = subject.arrival(lambda: os.rename(ready, subject.source / "big.bin"), arrived)
    return seconds, subject.wire_bytes(counter)


def switch(add, subject, history):
    """Switches a branch in a part of the tree, there and back."""
    folders = [side / "history" for side in (subject.source, subject.target)]
    for number, commit in enumerate((OLD, NEW, OLD)):
        started = time.perf_counter()
        subject.arrival(lambda: history.check_out(commit, folders[0]),
                        history.arrival(commit, folders[1]))
        # The first makes what is switched, and does not count.
        if number:
            add(SWITCH, "s", time.perf_counter() - started)


def save_many(add, subject, paths, run):
    """Saves files, one at a time, over their old content."""
    rng = random.Random(tree.SEED + run)
    for number in range(SAVES if subject.continuous else SAVES_OF_THE_STARTED):
        path = rng.choice(paths)
        content = f"// saved {run} {number}\n".encode() * rng.randint(20, 400)
        time.sleep(rng.uniform(*PAUSE_S))

        def arrived():
            try:
                return (subject.target / path).read_bytes() == content
            except FileNotFoundError:
                return False
        add(SAVE, "ms", 1000 * subject.arrival(
            lambda: (subject.source / path).write_bytes(content), arrived))
